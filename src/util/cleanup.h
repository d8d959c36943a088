#pragma once

#include <stdlib.h>
#include <unistd.h>

#include "util/buf.h"

/* Leaf cleanup by attribute: the variable is released when it goes out of scope. */
static inline void cleanup_freep(void *p) {
    free(*(void **)p);
}
static inline void cleanup_closep(int *fd) {
    if (*fd >= 0)
        close(*fd);
}
#define cleanup_free __attribute__((cleanup(cleanup_freep)))
#define cleanup_close __attribute__((cleanup(cleanup_closep)))
#define cleanup_buf __attribute__((cleanup(buf_free)))
