#pragma once

#define NONCE_LENGTH 32

/* 32 hex digits from the kernel's generator, and a NUL. 0 or -errno. */
int random_nonce(char out[NONCE_LENGTH + 1]);
