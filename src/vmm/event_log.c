#include "vmm/event_log.h"

#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"

#define EVENT_LOG_TURN (256 * 1024) /* bytes that are looked through in one turn of the loop */
#define EVENT_LOG_AGAIN_MS 1000     /* between looks at a file that cannot be watched */

struct event_log {
    uv_fs_event_t watch;
    uv_timer_t timer;  /* the rest of a long file, or one that is not watched */
    unsigned handles;  /* of these two, not yet closed */
    char *path, *word; /* owned */
    void (*found)(void *arg);
    void *arg;
    bool watched, told;
    dev_t device; /* of the file that was looked at last, */
    ino_t inode;
    off_t offset;                  /* how far, */
    char tail[EVENT_LOG_WORD_MAX]; /* and the last bytes up to there, which may begin the word */
    size_t tail_length;
};

static void event_log_on_closed(uv_handle_t *handle) {
    struct event_log *log = handle->data;
    if (--log->handles)
        return;
    free(log->path);
    free(log->word);
    free(log);
}

void event_log_close(struct event_log *log) {
    if (!log)
        return;
    uv_close((uv_handle_t *)&log->watch, event_log_on_closed);
    uv_close((uv_handle_t *)&log->timer, event_log_on_closed);
}

/* Is this the file of the last look, grown or as it was? */
static bool event_log_goes_on(const struct event_log *log, int fd, const struct stat *st) {
    char tail[EVENT_LOG_WORD_MAX];
    off_t at = log->offset - (off_t)log->tail_length;
    return st->st_dev == log->device && st->st_ino == log->inode && st->st_size >= log->offset &&
           pread(fd, tail, log->tail_length, at) == (ssize_t)log->tail_length &&
           memcmp(tail, log->tail, log->tail_length) == 0;
}

/* Looks through at most EVENT_LOG_TURN bytes. True: the word is there. */
static bool event_log_search(struct event_log *log, int fd) {
    char block[EVENT_LOG_WORD_MAX + 8192];
    for (size_t left = EVENT_LOG_TURN; left >= sizeof block;) {
        size_t before = log->tail_length;
        memcpy(block, log->tail, before);
        ssize_t n = pread(fd, block + before, sizeof block - before, log->offset);
        if (n <= 0)
            break;
        size_t length = before + (size_t)n;
        log->offset += n;
        left -= (size_t)n;
        log->tail_length = length < sizeof log->tail ? length : sizeof log->tail;
        memcpy(log->tail, block + length - log->tail_length, log->tail_length);
        if (memmem(block, length, log->word, strlen(log->word)))
            return true;
    }
    return false;
}

static void event_log_on_change(uv_fs_event_t *watch, const char *name, int events, int status);
static void event_log_on_timer(uv_timer_t *timer);

static void event_log_watch(struct event_log *log, bool anew) {
    if (anew && log->watched)
        uv_fs_event_stop(&log->watch);
    if (anew || !log->watched)
        log->watched = uv_fs_event_start(&log->watch, event_log_on_change, log->path, 0) == 0;
}

static void event_log_look(struct event_log *log) {
    struct stat st;
    cleanup_close int fd = open(log->path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        uv_timer_start(&log->timer, event_log_on_timer, EVENT_LOG_AGAIN_MS, 0);
        return;
    }
    /* Before the look: what comes behind it is told. */
    event_log_watch(log, st.st_dev != log->device || st.st_ino != log->inode);
    if (!event_log_goes_on(log, fd, &st)) {
        log->device = st.st_dev;
        log->inode = st.st_ino;
        log->offset = 0;
        log->tail_length = 0;
    }
    log->told = event_log_search(log, fd);
    if (log->told) {
        uv_timer_stop(&log->timer);
        uv_fs_event_stop(&log->watch);
        log->found(log->arg);
    } else if (log->offset < st.st_size) {
        uv_timer_start(&log->timer, event_log_on_timer, 1, 0);
    } else if (!log->watched) {
        uv_timer_start(&log->timer, event_log_on_timer, EVENT_LOG_AGAIN_MS, 0);
    }
}

static void event_log_on_timer(uv_timer_t *timer) {
    event_log_look(timer->data);
}

static void event_log_on_change(uv_fs_event_t *watch, const char *name, int events, int status) {
    struct event_log *log = watch->data;
    (void)name, (void)events, (void)status;
    if (!log->told)
        event_log_look(log);
}

int event_log_open(uv_loop_t *loop, const char *path, const char *word, void (*found)(void *arg),
                   void *arg, struct event_log **ret_log) {
    struct event_log *log = calloc(1, sizeof *log);
    if (!log)
        return -ERR_NO_MEMORY;
    *log = (struct event_log){
        .handles = 2, .path = strdup(path), .word = strdup(word), .found = found, .arg = arg};
    uv_fs_event_init(loop, &log->watch); /* these cannot fail */
    uv_timer_init(loop, &log->timer);
    log->watch.data = log->timer.data = log;
    if (!log->path || !log->word) {
        event_log_close(log);
        return -ERR_NO_MEMORY;
    }
    uv_timer_start(&log->timer, event_log_on_timer, 1, 0);
    *ret_log = log;
    return 0;
}
