#pragma once

#include <stddef.h>
#include <stdint.h>

/* Finds the host's port in the answer to QEMU's monitor command `info usernet`: the port on
 * 127.0.0.1 that is forwarded to `guest_port`. Returns 0 while there is none. QEMU has no QMP
 * command for this; the text is the table that libslirp prints (slirp_connection_info). */
uint16_t usernet_find_port(const char *text, size_t length, uint16_t guest_port);
