#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* The whole test framework: checks are counted, and a failed one says where and what. */
static int check_passed, check_failed;

__attribute__((format(printf, 4, 5))) static inline void check_at(const char *file, int line,
                                                                  int ok, const char *what, ...) {
    if (ok) {
        check_passed++;
        return;
    }
    check_failed++;
    va_list args;
    va_start(args, what);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, what, args);
    fputc('\n', stderr);
    va_end(args);
}

static inline int check_same(const void *a, size_t a_length, const void *b, size_t b_length) {
    return a_length == b_length && (!a_length || !memcmp(a, b, a_length));
}

static inline int check_end(void) {
    printf("%d passed, %d failed\n", check_passed, check_failed);
    return check_failed || !check_passed;
}

#define CHECK(condition) check_at(__FILE__, __LINE__, !!(condition), "%s", #condition)
#define CHECK_SAID(condition, ...) check_at(__FILE__, __LINE__, !!(condition), __VA_ARGS__)
