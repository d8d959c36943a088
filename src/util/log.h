#pragma once

#include <stdarg.h>

/* The daemon's log: lines of `time level text` on stderr, or in the file that stderr was turned to.
 * Values of variables and keys never go here. Bytes that are no printable ASCII or UTF-8 lead a
 * line astray and are written as `\xNN`. */
enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

void log_set_level(enum log_level most);

void log_write(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_write(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_write(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_write(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_write(LOG_DEBUG, __VA_ARGS__)
