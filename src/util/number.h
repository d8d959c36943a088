#pragma once

#include <stddef.h>
#include <stdint.h>

/* Numbers as users write them. Pure functions; the whole text has to be one. -EINVAL otherwise. */

/* 512, 64K, 100M, 1G, 1T (powers of 1,024); a number without a letter counts `unit` bytes. */
int number_parse_size(const char *text, uint64_t unit, uint64_t *ret_bytes);

/* FNV-1a, 64 bits: for names and against accidents, not against an enemy. */
uint64_t number_hash(const char *data, size_t length);

/* 90, 0.5: not negative. */
int number_parse_seconds(const char *text, double *ret_seconds);
