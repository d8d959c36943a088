#include "vm/scratch.h"

#include <stdlib.h>
#include <string.h>

#include "util/errors.h"
#include "util/log.h"
#include "vm/vm.h"

struct scratches {
    struct vm *vm; /* the owner */
    struct scratch_index index;
    size_t count, bytes;
    bool kept;
    scratch_guard *guard; /* NULL: anything goes */
    void *guard_arg;
    uv_timer_t *timer; /* expiry; runs while there is something */
};

static int scratch_compare(struct scratch *a, struct scratch *b) {
    return strcmp(a->name, b->name);
}
RB_GENERATE(scratch_index, scratch, entry, scratch_compare)

struct scratches *scratches_new(struct vm *vm) {
    struct scratches *table = calloc(1, sizeof *table);
    if (!table)
        return NULL;
    table->timer = malloc(sizeof *table->timer);
    if (!table->timer) {
        free(table);
        return NULL;
    }
    uv_timer_init(vm->daemon->loop, table->timer);
    table->timer->data = table;
    table->vm = vm;
    RB_INIT(&table->index);
    return table;
}

void scratches_free(struct scratches *table) {
    struct scratch *scratch;
    if (!table)
        return;
    while ((scratch = RB_MIN(scratch_index, &table->index)))
        scratch_remove(scratch);
    uv_close((uv_handle_t *)table->timer, (uv_close_cb)free);
    free(table);
}

void scratches_keep(struct scratches *table) {
    table->kept = true;
}

void scratches_guard(struct scratches *table, scratch_guard *guard, void *arg) {
    table->guard = guard;
    table->guard_arg = arg;
}

struct scratch_index *scratches_index(struct scratches *table) {
    return &table->index;
}

bool scratch_name_is_special(const char *name) {
    size_t length = strlen(name);
    return name[0] == '.' || name[0] == '#' || (length > 0 && name[length - 1] == '~');
}

struct scratch *scratch_ref(struct scratch *scratch) {
    scratch->refs++;
    return scratch;
}

void scratch_unref(struct scratch *scratch) {
    if (--scratch->refs > 0)
        return;
    if (scratch->content.data) /* may be the value of a variable to be */
        explicit_bzero(scratch->content.data, scratch->content.len);
    buf_free(&scratch->content);
    free(scratch->name);
    free(scratch);
}

static uint64_t scratch_now(const struct scratches *table) {
    return uv_now(table->vm->daemon->loop);
}

static void scratches_expire(uv_timer_t *timer) {
    struct scratches *table = timer->data;
    uint64_t life = table->vm->daemon->settings.scratch_timeout, now = scratch_now(table);
    struct scratch *scratch, *next;
    for (scratch = RB_MIN(scratch_index, &table->index); scratch; scratch = next) {
        next = RB_NEXT(scratch_index, &table->index, scratch);
        if (!scratch->open && now - scratch->used >= life) {
            log_info("%s: a temporary file that nobody used any more is gone", table->vm->id);
            scratch_remove(scratch);
        }
    }
    if (table->count)
        uv_timer_start(timer, scratches_expire, life / 2 + 1, 0);
}

struct scratch *scratch_find(struct scratches *table, const char *name) {
    struct scratch key = {.name = (char *)(uintptr_t)name};
    return RB_FIND(scratch_index, &table->index, &key);
}

void scratch_use(struct scratch *scratch) {
    if (scratch->table)
        scratch->used = scratch_now(scratch->table);
}

int scratch_make(struct scratches *table, const char *name, bool directory, mode_t mode,
                 struct scratch **ret_scratch) {
    if (table->count >= SCRATCH_COUNT_LIMIT)
        return vm_fail(table->vm, -ERR_NO_ROOM, "%u temporary files are here already; remove some",
                       SCRATCH_COUNT_LIMIT);
    struct scratch *scratch = calloc(1, sizeof *scratch);
    if (!scratch || !(scratch->name = strdup(name))) {
        free(scratch);
        return -ERR_NO_MEMORY;
    }
    scratch->table = table;
    scratch->refs = 1;
    scratch->directory = directory;
    scratch->look.mode = mode & 07777;
    scratch->look.uid = table->vm->daemon->uid;
    scratch->look.gid = table->vm->daemon->gid;
    scratch->number = SCRATCH_FIRST_NUMBER + ++table->vm->last_scratch % (SCRATCH_FIRST_NUMBER / 2);
    scratch->used = scratch_now(table);
    clock_gettime(CLOCK_REALTIME, &scratch->look.changed);
    scratch->look.read = scratch->look.changed;
    RB_INSERT(scratch_index, &table->index, scratch);
    if (table->count++ == 0 && !table->kept)
        uv_timer_start(table->timer, scratches_expire,
                       table->vm->daemon->settings.scratch_timeout / 2 + 1, 0);
    *ret_scratch = scratch;
    return 0;
}

void scratch_remove(struct scratch *scratch) {
    struct scratches *table = scratch->table;
    if (!table)
        return;
    RB_REMOVE(scratch_index, &table->index, scratch);
    table->bytes -= scratch->content.len;
    if (--table->count == 0)
        uv_timer_stop(table->timer);
    scratch->table = NULL;
    scratch_unref(scratch);
}

int scratch_rename(struct scratch *scratch, const char *new_name) {
    struct scratches *table = scratch->table;
    char *copy = strdup(new_name);
    if (!copy || !table) {
        free(copy);
        return copy ? -ERR_NOT_FOUND : -ERR_NO_MEMORY;
    }
    struct scratch *there = scratch_find(table, new_name);
    if (there && there != scratch)
        scratch_remove(there);
    RB_REMOVE(scratch_index, &table->index, scratch);
    scratch_use(scratch);
    free(scratch->name);
    scratch->name = copy;
    RB_INSERT(scratch_index, &table->index, scratch);
    return 0;
}

int scratch_check_room(const struct scratch *scratch, size_t size) {
    const struct scratches *table = scratch->table;
    size_t was = scratch->content.len;
    int r = size > SCRATCH_FILE_LIMIT ? -ERR_TOO_LARGE
            : table && size > was && table->bytes + (size - was) > SCRATCH_BYTES_LIMIT
                ? -ERR_NO_ROOM
                : 0;
    return r == 0 || !table
               ? r
               : vm_fail(table->vm, r,
                         "a temporary file takes %d bytes at most, all of a directory together %d",
                         SCRATCH_FILE_LIMIT, SCRATCH_BYTES_LIMIT);
}

static int scratch_ask_guard(const struct scratch *scratch, const char *name, size_t length,
                             char last) {
    const struct scratches *table = scratch->table;
    return table && table->guard
               ? table->guard(table->guard_arg, name, length, length && last == '\n')
               : 0;
}

int scratch_check_guard(const struct scratch *scratch, const char *name) {
    const struct buf *content = &scratch->content;
    return scratch_ask_guard(scratch, name, content->len,
                             content->len ? content->data[content->len - 1] : '\0');
}

/* Without asking the guard. */
static int scratch_set_size(struct scratch *scratch, off_t size) {
    struct scratches *table = scratch->table;
    struct buf *content = &scratch->content;
    size_t was = content->len;
    int r = size < 0 ? -ERR_TOO_LARGE : scratch_check_room(scratch, (size_t)size);
    if (r < 0)
        return r;
    static const char zeros[4096];
    while (content->len < (size_t)size && !content->failed) {
        size_t more = (size_t)size - content->len;
        buf_append(content, zeros, more < sizeof zeros ? more : sizeof zeros);
    }
    if (content->failed) {
        content->failed = 0;
        content->len = was;
        return -ERR_NO_MEMORY;
    }
    content->len = (size_t)size;
    if (table)
        table->bytes = table->bytes - was + content->len;
    clock_gettime(CLOCK_REALTIME, &scratch->look.changed);
    return 0;
}

int scratch_resize(struct scratch *scratch, off_t size) {
    const struct buf *content = &scratch->content;
    char last = size > 0 && (size_t)size <= content->len ? content->data[size - 1] : '\0';
    int r = size < 0 ? 0 : scratch_ask_guard(scratch, scratch->name, (size_t)size, last);
    return r < 0 ? r : scratch_set_size(scratch, size);
}

int scratch_write(struct scratch *scratch, const char *data, size_t length, off_t offset) {
    struct buf *content = &scratch->content;
    if (offset < 0 || offset > SCRATCH_FILE_LIMIT || length > SCRATCH_FILE_LIMIT)
        return scratch_check_room(scratch, SCRATCH_FILE_LIMIT + 1);
    size_t end = (size_t)offset + length;
    bool grows = length && end >= content->len;
    char last = grows ? data[length - 1] : content->len ? content->data[content->len - 1] : '\0';
    int r = scratch_ask_guard(scratch, scratch->name, grows ? end : content->len, last);
    if (r == 0 && end > content->len)
        r = scratch_set_size(scratch, (off_t)end);
    if (r < 0)
        return r;
    if (length)
        memcpy(scratch->content.data + offset, data, length);
    scratch_use(scratch);
    clock_gettime(CLOCK_REALTIME, &scratch->look.changed);
    return 0;
}
