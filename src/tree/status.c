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

static void status_open(struct node *node, int flags, struct request *rq) {
    struct text_handle *h = calloc(1, sizeof *h);
    if (!h) {
        request_answer(rq, -ERR_NO_MEMORY);
        return;
    }
    handle_init(&h->handle, node, flags);
    status_generate(node->vm, &h->text);
    request_answer_opened(rq, &h->handle);
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
    if (state != VM_RUNNING && state != VM_STOPPED) {
        request_answer(rq, vm_fail(vm, -ERR_INVALID,
                                   "status takes running or stopped, not what was written "
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
    .read = text_read,
    .write = status_write,
    .release = text_release,
    .setattr = node_setattr_ignore,
};
