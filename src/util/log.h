#pragma once

#include <stdarg.h>
#include <stdbool.h>

/* The daemon's log.
 *
 * In the foreground it goes to stderr, in lines of `time level text`; or, when stderr is a stream
 * of systemd's journal (JOURNAL_STREAM), with the priority prefixes of sd-daemon(3), as the journal
 * has the time itself. A daemon in the background (log_detach) tells the system's log, and where
 * there is none writes a file that does not grow beyond a bound.
 *
 * What is secret to its owner never goes here, at any level: values of variables, of a VM or of a
 * job, commands and their output, what was written and refused, what a guest says. Names do. Bytes
 * that are no printable ASCII or UTF-8 lead a line astray and are written as `\xNN`. */
enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARNING, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

/* By its name, as in `-o log_level=`. */
bool log_level_find(const char *name, enum log_level *ret_level);

/* To be called once, before anything is logged. */
void log_start(enum log_level most);
bool log_is_on(enum log_level level);

/* Of a daemon that is to be in the background and is not yet: lines are kept for log_detach(), or
 * dropped by log_end() if it does not come to that. Warnings and errors are also said on stderr,
 * which is still that of whoever has started it. */
void log_hold(void);

/* stderr is nobody's any more; what was held is logged. `file` (absolute; it and file.1 are
 * replaced) is used where the system has no log, or while that takes nothing. */
void log_detach(const char *file);

void log_end(void);

void log_write(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_write(LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_warn(...) log_write(LOG_LEVEL_WARNING, __VA_ARGS__)
#define log_info(...) log_write(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_debug(...) log_write(LOG_LEVEL_DEBUG, __VA_ARGS__)
