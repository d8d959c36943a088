#include "vm/console.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/log.h"
#include "vm/control.h"
#include "vm/vm.h"

#define CONSOLE_WATCH_KEPT 4096

struct console_watch {
    uv_fs_event_t event;
    struct vm *vm;
    int fd;
    char *line;
    struct buf text; /* the end of what has been read */
};

static void console_watch_closed(uv_handle_t *handle) {
    struct console_watch *watch = handle->data;
    close(watch->fd);
    free(watch->line);
    buf_free(&watch->text);
    free(watch);
}

void console_watch_stop(struct vm *vm) {
    if (vm->console_watch)
        uv_close((uv_handle_t *)&vm->console_watch->event, console_watch_closed);
    vm->console_watch = NULL;
}

static void console_watch_look(struct console_watch *watch) {
    char block[4096];
    ssize_t n;
    while ((n = read(watch->fd, block, sizeof block)) > 0) {
        buf_append(&watch->text, block, (size_t)n);
        if (watch->text.len &&
            memmem(watch->text.data, watch->text.len, watch->line, strlen(watch->line))) {
            struct vm *vm = watch->vm;
            console_watch_stop(vm);
            control_hurry(vm->control);
            return;
        }
        if (watch->text.len > 2 * CONSOLE_WATCH_KEPT)
            buf_consume(&watch->text, watch->text.len - CONSOLE_WATCH_KEPT);
    }
}

static void console_watch_event(uv_fs_event_t *event, const char *filename, int events,
                                int status) {
    (void)filename;
    (void)events;
    if (status == 0)
        console_watch_look(event->data);
}

void console_watch_start(struct vm *vm, const char *line) {
    struct buf path = {0};
    struct console_watch *watch = line[0] ? calloc(1, sizeof *watch) : NULL;
    console_watch_stop(vm);
    if (!watch)
        return;
    buf_printf(&path, "%s/serial.log", vm->dir);
    watch->fd = path.failed ? -1 : open(path.data, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    watch->line = strdup(line);
    watch->vm = vm;
    watch->event.data = watch;
    if (watch->fd < 0 || !watch->line || uv_fs_event_init(vm->daemon->loop, &watch->event) < 0) {
        if (watch->fd >= 0)
            close(watch->fd);
        free(watch->line);
        free(watch);
        buf_free(&path);
        return;
    }
    vm->console_watch = watch;
    if (uv_fs_event_start(&watch->event, console_watch_event, path.data, 0) < 0)
        console_watch_stop(vm);
    else
        console_watch_look(watch);
    buf_free(&path);
}

void console_last_words(const struct vm *vm, struct buf *out) {
    static const char mark[] = "\nvmsfs: ";
    cleanup_buf struct buf path = {0};
    char text[CONSOLE_WATCH_KEPT + 1] = "\n";
    buf_printf(&path, "%s/serial.log", vm->dir);
    cleanup_close int fd = path.failed ? -1 : open(path.data, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    off_t size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
    off_t from = size > CONSOLE_WATCH_KEPT - 1 ? size - (CONSOLE_WATCH_KEPT - 1) : 0;
    ssize_t n = fd < 0 ? 0 : pread(fd, text + 1, CONSOLE_WATCH_KEPT - 1, from);
    const char *last = NULL;
    for (const char *c = text; n > 0 && (c = strstr(c, mark)); c++)
        last = c + sizeof mark - 1;
    for (; last && (unsigned char)*last >= 0x20 && *last != 0x7f; last++)
        buf_append_char(out, *last);
}

void console_bound(struct vm *vm) {
    cleanup_buf struct buf path = {0};
    struct stat st;
    buf_printf(&path, "%s/serial.log", vm->dir);
    if (path.failed || lstat(path.data, &st) < 0 || st.st_size <= CONSOLE_LIMIT)
        return;
    /* The VMM has it open with O_APPEND: it goes on at the new end. */
    if (truncate(path.data, 0) == 0)
        log_warn("%s: the console has grown over %d MiB and starts anew", vm->id,
                 CONSOLE_LIMIT >> 20);
}
