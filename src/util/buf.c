#include "util/buf.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int buf_reserve(struct buf *b, size_t more) {
    if (b->failed)
        return b->failed;
    if (more > SIZE_MAX / 4 - b->len) {
        b->failed = -ENOMEM;
        return b->failed;
    }
    size_t need = b->len + more + 1;
    if (need <= b->cap)
        return 0;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need)
        cap *= 2;
    char *data = realloc(b->data, cap);
    if (!data) {
        b->failed = -ENOMEM;
        return b->failed;
    }
    b->data = data;
    b->cap = cap;
    return 0;
}

void buf_append(struct buf *b, const void *data, size_t len) {
    if (buf_reserve(b, len) < 0)
        return;
    if (len)
        memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = '\0';
}

void buf_patch(struct buf *b, size_t at, const void *data, size_t len) {
    while (b->len < at && !b->failed)
        buf_append_char(b, '\0');
    if (b->failed)
        return;
    size_t over = b->len - at < len ? b->len - at : len;
    if (over)
        memcpy(b->data + at, data, over);
    buf_append(b, (const char *)data + over, len - over);
}

void buf_append_str(struct buf *b, const char *s) {
    buf_append(b, s, strlen(s));
}

void buf_append_char(struct buf *b, char c) {
    buf_append(b, &c, 1);
}

void buf_vprintf(struct buf *b, const char *format, va_list args) {
    va_list again;
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    if (n >= 0 && buf_reserve(b, (size_t)n) == 0) {
        vsnprintf(b->data + b->len, (size_t)n + 1, format, again);
        b->len += (size_t)n;
    }
    va_end(again);
}

void buf_printf(struct buf *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    buf_vprintf(b, format, args);
    va_end(args);
}

void buf_consume(struct buf *b, size_t len) {
    if (!len)
        return;
    b->len -= len;
    memmove(b->data, b->data + len, b->len + 1);
}

void buf_clear(struct buf *b) {
    b->len = 0;
    b->failed = 0;
    if (b->data)
        b->data[0] = '\0';
}

void buf_free(struct buf *b) {
    free(b->data);
    *b = (struct buf){0};
}

char *buf_steal(struct buf *b, size_t *ret_len) {
    if (buf_reserve(b, 0) < 0)
        return NULL;
    b->data[b->len] = '\0';
    char *data = b->data;
    if (ret_len)
        *ret_len = b->len;
    *b = (struct buf){0};
    return data;
}
