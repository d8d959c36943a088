#include "util/log.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "util/cleanup.h"

static enum log_level log_most = LOG_INFO;

void log_set_level(enum log_level most) {
    log_most = most;
}

void log_write(enum log_level level, const char *format, ...) {
    static const char *const names[] = {"error", "warning", "info", "debug"};
    if (level > log_most)
        return;

    cleanup_buf struct buf text = {0};
    va_list args;
    va_start(args, format);
    buf_vprintf(&text, format, args);
    va_end(args);

    cleanup_buf struct buf line = {0};
    struct timespec now;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    buf_printf(&line, "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ %s ", tm.tm_year + 1900, tm.tm_mon + 1,
               tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, now.tv_nsec / 1000000, names[level]);
    for (size_t i = 0; i < text.len; i++) {
        unsigned char c = (unsigned char)text.data[i];
        if (c < 0x20 || c == 0x7f)
            buf_printf(&line, "\\x%02x", c);
        else
            buf_append_char(&line, (char)c);
    }
    buf_append_char(&line, '\n');
    if (!line.failed)
        (void)!write(STDERR_FILENO, line.data, line.len);
}
