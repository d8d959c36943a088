#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "tree/guest_wait.h"
#include "tree/text.h"
#include "tree/tree.h"
#include "util/errors.h"
#include "vm/scratch.h"
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
    enum vm_state seen; /* before that: what was read last, or might have been */
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

static struct status_handle *status_handle_new(struct node *node, int flags) {
    struct status_handle *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    handle_init(&h->text.handle, node, flags);
    list_init(&h->watch.link);
    h->watch.done = status_changed;
    h->seen = node->vm->state;
    status_generate(node->vm, &h->text.text);
    return h;
}

static void status_open(struct node *node, int flags, struct request *rq) {
    struct status_handle *h = status_handle_new(node, flags);
    if (h)
        request_answer_opened(rq, &h->text.handle);
    else
        request_answer(rq, -ERR_NO_MEMORY);
}

void status_create(struct node *dir, const struct node_row *row, int flags, struct request *rq) {
    struct node *node = node_child(dir, row->name, row->ops, row, dir->vm);
    struct status_handle *h = node ? status_handle_new(node, flags) : NULL;
    if (!h) {
        if (node)
            node_unref(node);
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    dir->vm->status_removed = 0;
    request_answer_created(rq, node, &h->text.handle);
}

static void status_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct status_handle *h = (struct status_handle *)handle;
    if (offset == 0) {
        struct vm *vm = handle->node->vm;
        enum vm_state state = h->count ? h->queue[0] : vm->state;
        if (h->count)
            memmove(h->queue, h->queue + 1, --h->count * sizeof *h->queue);
        buf_clear(&h->text.text);
        buf_printf(&h->text.text, "%s\n", vm_state_name(state));
        h->seen = state;
    }
    text_read(handle, length, offset, rq);
}

static unsigned status_poll(struct handle *handle) {
    struct status_handle *h = (struct status_handle *)handle;
    struct vm *vm = handle->node->vm;
    if (!h->watching) {
        h->watching = true;
        list_append(&vm->watches, &h->watch.link);
        if (vm->state != h->seen) /* between the read and this */
            h->queue[h->count++] = vm->state;
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

/* The desired state that a text says; a negative value: none, with words. */
static int status_parse(struct vm *vm, const char *data, size_t length) {
    while (length > 0 && (data[length - 1] == '\n' || data[length - 1] == ' '))
        length--;
    int state = vm_state_from_name(data, length);
    if (state == VM_RUNNING || state == VM_PAUSED || state == VM_STOPPED)
        return state;
    return vm_fail(vm, -ERR_INVALID,
                   "status takes running, paused or stopped, not what was written (%zu bytes)",
                   length);
}

/* Asks for it, for a request that is about `node`. */
static void status_want(struct node *node, enum vm_state state, guest_answer *answer, void *arg,
                        struct request *rq) {
    const struct vm *vm = node->vm;
    /* A change of state has deadlines of its own: those of the boot, and of each step of a stop.
     * But a guest that does not answer is tried for ever. */
    bool forever = state == VM_RUNNING && (vm->state == VM_UNREACHABLE || vm->state == VM_PAUSED);
    struct vm_wait *wait = guest_wait(node, forever ? "status" : NULL, answer, arg, rq);
    int r = wait ? vm_want(node->vm, state, wait) : 0;
    if (r < 0)
        guest_wait_settle(wait, r);
}

static void status_write(struct handle *handle, const char *data, size_t length, off_t offset,
                         struct request *rq) {
    int state = status_parse(handle->node->vm, data, length);
    (void)offset;
    if (state < 0)
        request_answer(rq, state);
    else
        status_want(handle->node, (enum vm_state)state, status_reached, (void *)(uintptr_t)length,
                    rq);
}

struct status_rename {
    struct node *dir;        /* a reference */
    struct scratch *scratch; /* a reference */
    const struct node_row *row;
};

static void status_renamed(void *arg, int status, struct request *rq) {
    struct status_rename *r = arg;
    if (status == 0) {
        r->dir->vm->status_removed = 0;
        vmdir_take_scratch(r->dir, r->scratch, r->row->name);
    }
    scratch_unref(r->scratch);
    node_unref(r->dir);
    free(r);
    request_answer(rq, status);
}

void status_take(struct node *dir, const struct node_row *row, struct scratch *scratch,
                 struct request *rq) {
    const struct buf *text = &scratch->content;
    int state = status_parse(dir->vm, text->data ? text->data : "", text->len);
    struct status_rename *rename = state < 0 ? NULL : malloc(sizeof *rename);
    if (!rename) {
        request_answer(rq, state < 0 ? state : -ERR_NO_MEMORY);
        return;
    }
    *rename = (struct status_rename){node_ref(dir), scratch_ref(scratch), row};
    status_want(dir, (enum vm_state)state, status_renamed, rename, rq);
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
