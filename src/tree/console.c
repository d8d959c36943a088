#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>

#include "tree/tree.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/vm.h"

/* ID/console: the guest's serial console, which the VMM writes to a file of ours. */

#define CONSOLE_READ_MAX (128 * 1024)

struct console_handle {
    struct handle handle;
    int fd; /* -1: nothing has been written yet */
};

static int console_file(const struct vm *vm) {
    cleanup_buf struct buf path = {0};
    buf_printf(&path, "%s/serial.log", vm->dir);
    return path.failed ? -1 : open(path.data, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
}

static void console_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;

    struct stat st;
    cleanup_close int fd = console_file(node->vm);
    if (fd >= 0 && fstat(fd, &st) == 0) {
        ret_stat->st.st_size = st.st_size;
        ret_stat->st.st_mtim = ret_stat->st.st_ctim = st.st_mtim;
    }
}

static void console_open(struct node *node, int flags, struct request *rq) {
    struct console_handle *h = malloc(sizeof *h);
    if (!h) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    handle_init(&h->handle, node, flags);
    h->fd = console_file(node->vm);
    request_answer_opened(rq, &h->handle);
}

static void console_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct console_handle *h = (struct console_handle *)handle;
    if (h->fd < 0)
        h->fd = console_file(handle->node->vm);
    if (length > CONSOLE_READ_MAX)
        length = CONSOLE_READ_MAX;
    cleanup_free char *data = malloc(length);
    ssize_t n = h->fd < 0 ? 0 : data ? pread(h->fd, data, length, offset) : -1;
    if (n < 0)
        request_answer(rq, -ERR_IO);
    else
        request_answer_data(rq, data, (size_t)n);
}

static void console_release(struct handle *handle) {
    struct console_handle *h = (struct console_handle *)handle;
    if (h->fd >= 0)
        close(h->fd);
    handle_done(handle);
    free(h);
}

const struct node_ops console_ops = {
    .stat = console_stat,
    .open = console_open,
    .read = console_read,
    .release = console_release,
    .setattr = node_setattr_ignore,
};
