#include "util/log.h"

#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "util/buf.h"
#include "util/cleanup.h"

#define LOG_SOCKET "/dev/log"
#define LOG_FACILITY (3 << 3)    /* daemon, of syslog(3) */
#define LOG_FILE_LIMIT (1 << 20) /* then it is put aside, for the one before */
#define LOG_HELD_MOST 1000       /* lines; what comes then is left out */

static const struct {
    const char *name;
    int priority; /* of syslog(3) */
} log_levels[] = {
    [LOG_LEVEL_ERROR] = {"error", 3},
    [LOG_LEVEL_WARNING] = {"warning", 4},
    [LOG_LEVEL_INFO] = {"info", 6},
    [LOG_LEVEL_DEBUG] = {"debug", 7},
};
#define LOG_LEVELS (sizeof log_levels / sizeof *log_levels)

static struct {
    enum log_level most;
    bool journal; /* stderr is a stream of it */
    int socket;   /* to the system's log; -1: in the foreground */
    char *path;   /* of the file; NULL: in the foreground */
    bool open;    /* the file is stderr */
    off_t length; /* of the file */
    bool holds;
    struct log_line {
        enum log_level level;
        struct timespec time;
        struct buf text; /* owned */
    } * held;
    size_t held_count;
} log_self = {.most = LOG_LEVEL_INFO, .socket = -1};

bool log_level_find(const char *name, enum log_level *ret_level) {
    for (size_t i = 0; i < LOG_LEVELS; i++)
        if (strcmp(name, log_levels[i].name) == 0) {
            *ret_level = (enum log_level)i;
            return true;
        }
    return false;
}

/* The device and inode of the stream that systemd has connected stdout or stderr to
 * (systemd.exec(5), JOURNAL_STREAM): a redirection of stderr makes it somebody else's. */
static bool log_is_journal(void) {
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long device, inode;
    struct stat st;
    return stream && sscanf(stream, "%llu:%llu", &device, &inode) == 2 &&
           fstat(STDERR_FILENO, &st) == 0 && st.st_dev == device && st.st_ino == inode;
}

void log_start(enum log_level most) {
    log_self.most = most;
    log_self.journal = log_is_journal();
}

bool log_is_on(enum log_level level) {
    return level <= log_self.most;
}

/* Not by syslog(3), which waits for a log that does not take what it is sent, and the daemon must
 * not. Without a connection there is none to be lost when the log is started anew. */
static bool log_send(enum log_level level, const struct tm *local, const struct buf *text) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = LOG_SOCKET};
    static const char *const months[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                         "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
    cleanup_buf struct buf line = {0};
    if (log_self.socket < 0)
        return false;
    buf_printf(&line,
               "<%d>%s %2d %02d:%02d:%02d vmsfs[%d]: ", LOG_FACILITY | log_levels[level].priority,
               months[local->tm_mon], local->tm_mday, local->tm_hour, local->tm_min, local->tm_sec,
               (int)getpid());
    buf_append(&line, text->data, text->len);
    return !line.failed && sendto(log_self.socket, line.data, line.len, MSG_NOSIGNAL,
                                  (struct sockaddr *)&address, sizeof address) >= 0;
}

/* stderr becomes the file, so that it has the last words of a library as well. */
static bool log_open(void) {
    struct stat st;
    cleanup_close int fd =
        open(log_self.path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0 || fstat(fd, &st) < 0 || dup2(fd, STDERR_FILENO) < 0)
        return false;
    log_self.length = st.st_size;
    return true;
}

static void log_bound(size_t more) {
    if (log_self.open && log_self.length + (off_t)more > LOG_FILE_LIMIT) {
        cleanup_buf struct buf before = {0};
        buf_printf(&before, "%s.1", log_self.path);
        if (!before.failed && rename(log_self.path, before.data) == 0)
            log_self.open = false;
        else
            log_self.length = 0; /* not at each line */
    }
    if (!log_self.open)
        log_self.open = log_open();
    log_self.length += (off_t)more;
}

static void log_print(enum log_level level, const struct timespec *now, const struct buf *text) {
    cleanup_buf struct buf line = {0};
    struct tm tm;
    gmtime_r(&now->tv_sec, &tm);
    if (log_self.journal)
        buf_printf(&line, "<%d>", log_levels[level].priority);
    else
        buf_printf(&line, "%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ %s ", tm.tm_year + 1900,
                   tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec,
                   now->tv_nsec / 1000000, log_levels[level].name);
    buf_append(&line, text->data, text->len);
    buf_append_char(&line, '\n');
    if (line.failed)
        return;
    if (log_self.path)
        log_bound(line.len);
    (void)!write(STDERR_FILENO, line.data, line.len);
}

static void log_put(enum log_level level, const struct timespec *time, const struct buf *text) {
    struct tm local;
    localtime_r(&time->tv_sec, &local);
    if (!log_send(level, &local, text))
        log_print(level, time, text);
}

/* What is wrong is said at once, to who has started us. */
static void log_keep(enum log_level level, const struct timespec *time, const struct buf *text) {
    if (level <= LOG_LEVEL_WARNING && log_self.journal)
        log_print(level, time, text);
    else if (level <= LOG_LEVEL_WARNING)
        fprintf(stderr, "vmsfs: %s\n", text->data);
    struct log_line *held = log_self.held_count < LOG_HELD_MOST
                                ? realloc(log_self.held, (log_self.held_count + 1) * sizeof *held)
                                : NULL;
    if (!held)
        return;
    log_self.held = held;
    held[log_self.held_count] = (struct log_line){.level = level, .time = *time};
    buf_append(&held[log_self.held_count++].text, text->data, text->len);
}

void log_write(enum log_level level, const char *format, ...) {
    if (!log_is_on(level))
        return;

    cleanup_buf struct buf text = {0}, clean = {0};
    va_list args;
    va_start(args, format);
    buf_vprintf(&text, format, args);
    va_end(args);
    for (size_t i = 0; i < text.len; i++) {
        unsigned char c = (unsigned char)text.data[i];
        if (c < 0x20 || c == 0x7f)
            buf_printf(&clean, "\\x%02x", c);
        else
            buf_append_char(&clean, (char)c);
    }
    if (clean.failed || !clean.len)
        return;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (log_self.holds)
        log_keep(level, &now, &clean);
    else
        log_put(level, &now, &clean);
}

void log_hold(void) {
    log_self.holds = true;
}

static void log_drop_held(void) {
    for (size_t i = 0; i < log_self.held_count; i++)
        buf_free(&log_self.held[i].text);
    free(log_self.held);
    log_self.held = NULL;
    log_self.held_count = 0;
    log_self.holds = false;
}

void log_detach(const char *file) {
    log_self.path = strdup(file);
    log_self.journal = false;
    log_self.socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    for (size_t i = 0; i < log_self.held_count; i++) {
        const struct log_line *line = &log_self.held[i];
        log_put(line->level, &line->time, &line->text);
    }
    log_drop_held();
}

void log_end(void) {
    if (log_self.socket >= 0)
        close(log_self.socket);
    log_self.socket = -1;
    free(log_self.path);
    log_self.path = NULL;
    log_drop_held();
}
