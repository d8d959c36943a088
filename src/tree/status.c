#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "tree/guest_wait.h"
#include "tree/text.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/vm.h"

/* ID/status: reads how the VM is, and is written how it should be. */

static bool status_generate(struct vm *vm, struct buf *out) {
    buf_append_str(out, vm_state_name(vm->state));
    buf_append_char(out, '\n');
    return true;
}

static void status_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_size = (off_t)strlen(vm_state_name(node->vm->state)) + 1;
    ret_stat->entry_seconds = 0; /* while a write waits, others get a node of their own */
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
}

/* One that has polled is told each change, one after the other: what is read from the start of the
 * file is the oldest that it has not been told. */
#define STATUS_QUEUE 32

struct status_handle {
    struct text_handle text;
    struct vm_wait watch;
    bool watching;
    enum vm_state queue[STATUS_QUEUE];
    unsigned count;
};

static void status_changed(struct vm_wait *wait, int status) {
    struct status_handle *h = LIST_OWNER(wait, struct status_handle, watch);
    struct vm *vm = h->text.handle.node->vm;
    (void)status;
    if (h->count == STATUS_QUEUE) /* the newest counts */
        h->count--;
    h->queue[h->count++] = vm->state;
    list_append(&vm->watches, &h->watch.link);
    if (h->text.handle.wake)
        h->text.handle.wake(&h->text.handle);
}

static void status_open(struct node *node, int flags, struct request *rq) {
    struct status_handle *h = calloc(1, sizeof *h);
    if (!h) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    handle_init(&h->text.handle, node, flags);
    list_init(&h->watch.link);
    h->watch.done = status_changed;
    status_generate(node->vm, &h->text.text);
    request_answer_opened(rq, &h->text.handle);
}

static void status_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct status_handle *h = (struct status_handle *)handle;
    if (offset == 0 && h->watching) {
        struct vm *vm = handle->node->vm;
        enum vm_state state = h->count ? h->queue[0] : vm->state;
        if (h->count)
            memmove(h->queue, h->queue + 1, --h->count * sizeof *h->queue);
        buf_clear(&h->text.text);
        buf_printf(&h->text.text, "%s\n", vm_state_name(state));
    }
    text_read(handle, length, offset, rq);
}

static unsigned status_poll(struct handle *handle) {
    struct status_handle *h = (struct status_handle *)handle;
    if (!h->watching) {
        h->watching = true;
        list_append(&handle->node->vm->watches, &h->watch.link);
    }
    return POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM | (h->count ? POLLPRI : 0);
}

static void status_release(struct handle *handle) {
    struct status_handle *h = (struct status_handle *)handle;
    vm_wait_cancel(&h->watch);
    text_release(handle);
}

static void status_reached(void *arg, int status, struct request *rq) {
    if (status < 0)
        request_answer(rq, status);
    else
        request_answer_written(rq, (size_t)(uintptr_t)arg);
}

static void status_write(struct handle *handle, const char *data, size_t length, off_t offset,
                         struct request *rq) {
    struct vm *vm = handle->node->vm;
    size_t word = length;
    (void)offset;
    while (word > 0 && (data[word - 1] == '\n' || data[word - 1] == ' '))
        word--;
    int state = vm_state_from_name(data, word);
    if (state != VM_RUNNING && state != VM_PAUSED && state != VM_STOPPED) {
        request_answer(rq, vm_fail(vm, -ERR_INVALID,
                                   "status takes running, paused or stopped, not what was written "
                                   "(%zu bytes)",
                                   word));
        return;
    }
    /* A change of state has deadlines of its own: those of the boot, and of each step of a stop. */
    const char *what = vm->state == VM_UNREACHABLE ? "status" : NULL; /* it is tried for ever */
    struct vm_wait *wait =
        guest_wait(handle->node, what, status_reached, (void *)(uintptr_t)length, rq);
    int r = wait ? vm_want(vm, (enum vm_state)state, wait) : 0;
    if (r < 0)
        guest_wait_settle(wait, r);
}

const struct node_ops status_ops = {
    .stat = status_stat,
    .open = status_open,
    .read = status_read,
    .write = status_write,
    .poll = status_poll,
    .release = status_release,
    .setattr = node_setattr_ignore,
};
