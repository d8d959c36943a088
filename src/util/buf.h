#pragma once

#include <stdarg.h>
#include <stddef.h>

/* A growable string of bytes. `data` has a NUL behind its `len` bytes whenever it is not NULL. A
 * zeroed struct is an empty buffer. Appending can only fail for want of memory; the failure is
 * sticky
 * (`failed`), so that a sequence of appends is checked once, at its end. */
struct buf {
    char *data;
    size_t len;
    size_t cap;
    int failed; /* 0, or -ENOMEM */
};

void buf_append(struct buf *b, const void *data, size_t len);
/* Lays the bytes over what is there from `at` on; a gap is filled with NUL. */
void buf_patch(struct buf *b, size_t at, const void *data, size_t len);
void buf_append_str(struct buf *b, const char *s);
void buf_append_char(struct buf *b, char c);
void buf_printf(struct buf *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
void buf_vprintf(struct buf *b, const char *format, va_list args)
    __attribute__((format(printf, 2, 0)));

/* Drops the first `len` bytes. */
void buf_consume(struct buf *b, size_t len);

/* Empties the buffer but keeps its memory. */
void buf_clear(struct buf *b);

void buf_free(struct buf *b);

/* Hands the bytes to the caller, who frees them; the buffer is empty afterwards. Never NULL unless
 * the buffer has failed. */
char *buf_steal(struct buf *b, size_t *ret_len);
