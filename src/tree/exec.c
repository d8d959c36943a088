#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "tree/output.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/command.h"

/* ID/exec: each open is a session of its own (design, section 4). What is written in pieces (line
 * by line by bash, in blocks by cat) would be several commands: the second piece is refused.
 *
 *   write-only   one WRITE is one command; it returns when the command has ended
 *   read-write   WRITE starts a command, READ streams its output and ends with it
 *   read-only    the output of the newest command
 *
 * The kernel moves the file position of whoever shares a descriptor, so offsets say nothing here: a
 * handle reads on from where it has read to. */

struct exec_handle {
    struct handle handle;
    struct command *command; /* whose output is read; NULL: none. A reference */
    uint64_t position;
    struct vm_wait polled;
    bool own;     /* started by this handle: ends with it */
    bool written; /* since it was opened, flushed or read from: what follows is more of that */
};

/* A request that waits for a command. */
struct exec_wait {
    struct vm_wait wait;
    struct request *rq;
    struct exec_handle *h;
    struct command *command; /* a reference */
    size_t length;           /* of what was written, or is to be read */
};

static void exec_stat(const struct node *node, struct node_stat *ret_stat) {
    struct command *newest = command_newest(node->vm);
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_size = newest ? output_size(newest, &newest->out) : 0;
    ret_stat->entry_seconds = 0; /* a node for each lookup */
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
}

static void exec_wake(struct vm_wait *wait, int status) {
    struct exec_handle *h = LIST_OWNER(wait, struct exec_handle, polled);
    (void)status;
    if (h->handle.wake)
        h->handle.wake(&h->handle);
}

static void exec_open(struct node *node, int flags, struct request *rq) {
    struct exec_handle *h = calloc(1, sizeof *h);
    if (!h) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    handle_init(&h->handle, node, flags);
    h->handle.uncached = true;
    list_init(&h->polled.link);
    h->polled.done = exec_wake;
    struct command *newest = command_newest(node->vm);
    if ((flags & O_ACCMODE) == O_RDONLY && newest)
        h->command = command_ref(newest);
    request_answer_opened(rq, &h->handle);
}

static void exec_wait_free(struct exec_wait *w) {
    vm_wait_cancel(&w->wait);
    command_unref(w->command);
    free(w);
}

static struct exec_wait *exec_wait_new(struct exec_handle *h, struct command *command,
                                       struct request *rq, size_t length,
                                       void (*done)(struct vm_wait *wait, int status)) {
    struct exec_wait *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->wait.done = done;
    list_append(&command->waits, &w->wait.link);
    w->rq = rq;
    w->h = h;
    w->command = command_ref(command);
    w->length = length;
    return w;
}

static void exec_command_progress(struct vm_wait *wait, int status) {
    struct exec_wait *w = LIST_OWNER(wait, struct exec_wait, wait);
    (void)status;
    if (w->command->end == COMMAND_RUNNING) { /* only output */
        list_append(&w->command->waits, &w->wait.link);
        return;
    }
    struct request *rq = w->rq;
    size_t length = w->length;
    int r = command_verdict(w->command);
    exec_wait_free(w);
    if (r < 0)
        request_answer(rq, r);
    else
        request_answer_written(rq, length);
}

static void exec_write_cancel(struct request *rq, int status, void *arg) {
    struct exec_wait *w = arg;
    command_kill(w->command, COMMAND_KILL_S);
    exec_wait_free(w);
    request_answer(rq, status);
}

static void exec_write(struct handle *handle, const char *data, size_t length, off_t offset,
                       struct request *rq) {
    struct exec_handle *h = (struct exec_handle *)handle;
    struct command *command;
    (void)offset;
    if (h->own && h->command && h->command->end == COMMAND_RUNNING) {
        request_answer(rq,
                       vm_fail(handle->node->vm, -ERR_BUSY,
                               "exec: the command written before on this open file still runs"));
        return;
    }
    if (h->written) {
        request_answer(rq, vm_fail(handle->node->vm, -ERR_INVALID,
                                   "exec: one write is one command (of %d bytes at most), and this "
                                   "is more of the one before, which has run: bash writes line by "
                                   "line, so give it a here-document with cat, or open the file "
                                   "for each command",
                                   COMMAND_LIMIT));
        return;
    }
    h->written = true;
    size_t text = length;
    while (text > 0 && data[text - 1] == '\n')
        text--;
    struct vm *vm = handle->node->vm;
    const struct command_spec spec = {
        .name = "exec",
        .guest = {.text = data, .length = text, .login = vm_uses_login_shell(vm)},
        .output_max = vm->daemon->settings.output_max,
    };
    int r = command_run(vm, &spec, &command);
    if (r < 0) {
        request_answer(rq, r);
        return;
    }
    command_set_newest(command);
    if ((handle->flags & O_ACCMODE) == O_RDWR) {
        vm_wait_cancel(&h->polled);
        if (h->command)
            command_unref(h->command);
        h->command = command;
        h->position = 0;
        h->own = true;
        request_answer_written(rq, length);
        return;
    }
    struct exec_wait *w = exec_wait_new(h, command, rq, length, exec_command_progress);
    if (!w) {
        command_kill(command, COMMAND_KILL_S);
        request_answer(rq, -ERR_NO_MEMORY);
    } else {
        /* No deadline: a command may take its time. What is watched is that the guest is alive. */
        request_wait(rq, 0, exec_write_cancel, w);
    }
    command_unref(command);
}

/* Answers a READ from the spool; false when there is nothing to say yet. */
static bool exec_answer_read(struct exec_handle *h, size_t length, struct request *rq) {
    struct command *command = h->command;
    if (!command) {
        request_answer_data(rq, "", 0);
        return true;
    }
    return output_answer_read(command, &command->out, &h->position, length, rq);
}

static void exec_read_progress(struct vm_wait *wait, int status) {
    struct exec_wait *w = LIST_OWNER(wait, struct exec_wait, wait);
    (void)status;
    if (exec_answer_read(w->h, w->length, w->rq))
        exec_wait_free(w);
    else
        list_append(&w->command->waits, &w->wait.link);
}

static void exec_read_cancel(struct request *rq, int status, void *arg) {
    exec_wait_free(arg);
    request_answer(rq, status);
}

static void exec_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct exec_handle *h = (struct exec_handle *)handle;
    (void)offset;
    h->written = false;
    if (exec_answer_read(h, length, rq))
        return;
    if (handle->flags & O_NONBLOCK) {
        request_answer(rq, -ERR_AGAIN);
        return;
    }
    struct exec_wait *w = exec_wait_new(h, h->command, rq, length, exec_read_progress);
    if (!w)
        request_answer(rq, -ERR_NO_MEMORY);
    else
        request_wait(rq, 0, exec_read_cancel, w);
}

/* A descriptor of it was closed: what a shell does after each command that it had redirected. */
static void exec_flush(struct handle *handle, struct request *rq) {
    struct exec_handle *h = (struct exec_handle *)handle;
    h->written = false;
    request_answer(rq, 0);
}

static unsigned exec_poll(struct handle *handle) {
    struct exec_handle *h = (struct exec_handle *)handle;
    const struct command *command = h->command;
    unsigned writable = h->own && command->end == COMMAND_RUNNING ? 0 : POLLOUT | POLLWRNORM;
    vm_wait_cancel(&h->polled);
    if (!command || command->end != COMMAND_RUNNING || command->out.end > h->position ||
        command->out.cut)
        return writable | POLLIN | POLLRDNORM;
    list_append(&h->command->waits, &h->polled.link);
    return writable;
}

static void exec_release(struct handle *handle) {
    struct exec_handle *h = (struct exec_handle *)handle;
    vm_wait_cancel(&h->polled);
    if (h->command) {
        if (h->own)
            command_kill(h->command, COMMAND_KILL_S);
        command_unref(h->command);
    }
    handle_done(handle);
    free(h);
}

const struct node_ops exec_ops = {
    .stat = exec_stat,
    .open = exec_open,
    .read = exec_read,
    .write = exec_write,
    .flush = exec_flush,
    .poll = exec_poll,
    .release = exec_release,
    .setattr = node_setattr_ignore,
};
