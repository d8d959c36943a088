#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/control.h"
#include "vm/vars_internal.h"

/* How changes take effect. Commits that come while a batch is under way are queued and become the next batch, whose
 * changes are laid over the table (the overlay), sent as one, and put into the table only when the verdict is success. So
 * the table never shows what was not acknowledged, and a failure leaves it as it was. */

struct vars_commit {
    struct list link; /* in vars->queued or batch->commits */
    struct list wait; /* holds the one vm_wait, or none */
    size_t count;
    struct vars_commit_change {
        char *name;
        char *bytes; /* NULL: unset */
        size_t length;
    } changes[];
};

struct vars_batch {
    struct vars *vars; /* NULL: the VM is gone, only the answer is still to come */
    struct list commits;
    bool to_guest; /* else to the disk */
    size_t count;
    struct vars_commit_change *overlay[]; /* sorted by name, each name once; owned by the commits */
};

static void commit_free(struct vars_commit *commit) {
    for (size_t i = 0; i < commit->count; i++) {
        free(commit->changes[i].name);
        if (commit->changes[i].bytes)
            explicit_bzero(commit->changes[i].bytes, commit->changes[i].length);
        free(commit->changes[i].bytes);
    }
    free(commit);
}

static void commits_end(struct list *commits, int status) {
    struct list *link;
    while ((link = list_pop(commits))) {
        struct vars_commit *commit = LIST_OWNER(link, struct vars_commit, link);
        vm_wait_wake(&commit->wait, status);
        commit_free(commit);
    }
}

static struct vars_commit *commit_new(const struct var_change *changes, size_t count) {
    struct vars_commit *commit = calloc(1, sizeof *commit + count * sizeof *commit->changes);
    if (!commit)
        return NULL;
    list_init(&commit->link);
    list_init(&commit->wait);
    for (size_t i = 0; i < count; i++) {
        struct vars_commit_change *c = &commit->changes[commit->count++];
        c->name = strdup(changes[i].name);
        c->length = changes[i].length;
        if (changes[i].bytes) {
            c->bytes = malloc(c->length + 1);
            if (c->bytes && c->length)
                memcpy(c->bytes, changes[i].bytes, c->length);
        }
        if (!c->name || (changes[i].bytes && !c->bytes)) {
            commit_free(commit);
            return NULL;
        }
    }
    return commit;
}

static size_t change_size(const char *name, const char *bytes, size_t length) {
    return bytes ? strlen(name) + length : 0;
}

/* What `name` will take when everything that is pending is done. */
static size_t vars_pending_size(struct vars *vars, const char *name) {
    const struct vars_commit_change *found = NULL;
    for (int i = 0; i < 2; i++) {
        struct list *head = i == 0 ? (vars->flight ? &vars->flight->commits : NULL) : &vars->queued;
        for (struct list *l = head ? head->next : NULL; l && l != head; l = l->next) {
            struct vars_commit *commit = LIST_OWNER(l, struct vars_commit, link);
            for (size_t c = 0; c < commit->count; c++)
                if (strcmp(commit->changes[c].name, name) == 0)
                    found = &commit->changes[c];
        }
    }
    if (found)
        return change_size(name, found->bytes, found->length);
    const struct var *var = vars_find(vars, name);
    return var && var->set ? change_size(name, var->bytes, var->length) : 0;
}

/* What is pending has changed in an unforeseen way: count anew. */
static void vars_project(struct vars *vars) {
    vars->projected = vars->total;
    struct list pending;
    list_init(&pending);
    list_splice(&pending, &vars->queued);
    struct list *link;
    while ((link = list_pop(&pending))) {
        struct vars_commit *commit = LIST_OWNER(link, struct vars_commit, link);
        for (size_t i = 0; i < commit->count; i++) {
            const struct vars_commit_change *c = &commit->changes[i];
            vars->projected += change_size(c->name, c->bytes, c->length);
            vars->projected -= vars_pending_size(vars, c->name);
        }
        list_append(&vars->queued, &commit->link);
    }
}

static int overlay_compare(const void *a, const void *b) {
    const struct vars_commit_change *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

/* Takes all that is queued. The overlay is the last change of each name. */
static struct vars_batch *batch_new(struct vars *vars) {
    size_t count = 0;
    for (struct list *l = vars->queued.next; l != &vars->queued; l = l->next)
        count += LIST_OWNER(l, struct vars_commit, link)->count;
    struct vars_batch *batch = calloc(1, sizeof *batch + count * sizeof *batch->overlay);
    if (!batch)
        return NULL;
    batch->vars = vars;
    list_init(&batch->commits);
    list_splice(&batch->commits, &vars->queued);

    /* Later changes first, so that of equal names the first to be taken is the last one made. */
    for (struct list *l = batch->commits.prev; l != &batch->commits; l = l->prev) {
        struct vars_commit *commit = LIST_OWNER(l, struct vars_commit, link);
        for (size_t i = commit->count; i-- > 0;) {
            struct vars_commit_change *c = &commit->changes[i];
            struct vars_commit_change **at =
                bsearch(&c, batch->overlay, batch->count, sizeof *at, overlay_compare);
            if (at)
                continue;
            batch->overlay[batch->count++] = c;
            for (size_t k = batch->count - 1;
                 k > 0 && strcmp(batch->overlay[k - 1]->name, batch->overlay[k]->name) > 0; k--) {
                struct vars_commit_change *swap = batch->overlay[k - 1];
                batch->overlay[k - 1] = batch->overlay[k];
                batch->overlay[k] = swap;
            }
        }
    }
    return batch;
}

const struct vars_batch *vars_disk_batch(const struct vars *vars) {
    return vars->flight && !vars->flight->to_guest ? vars->flight : NULL;
}

int vars_walk(const struct vars *vars, const struct vars_batch *batch,
              int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
              void *arg) {
    struct var_index *index = (struct var_index *)(uintptr_t)&vars->index;
    struct var *var = RB_MIN(var_index, index);
    size_t at = 0, count = batch ? batch->count : 0;
    int r = 0;
    while (r == 0 && (var || at < count)) {
        int order = !var ? 1 : at == count ? -1 : strcmp(var->name, batch->overlay[at]->name);
        if (order < 0) {
            if (var->set)
                r = visit(arg, var->name, var->bytes, var->length);
        } else {
            const struct vars_commit_change *c = batch->overlay[at++];
            if (c->bytes)
                r = visit(arg, c->name, c->bytes, c->length);
        }
        if (order <= 0)
            var = RB_NEXT(var_index, index, var);
    }
    return r;
}

struct vars_format {
    struct env_var *vars;
    size_t count;
};

static int vars_format_one(void *arg, const char *name, const char *bytes, size_t length) {
    struct vars_format *format = arg;
    format->vars[format->count++] =
        (struct env_var){name, strlen(name), bytes, var_value_length(bytes, length)};
    return 0;
}

static int vars_format(const struct vars *vars, const struct vars_batch *batch, struct buf *out) {
    size_t most = vars_count(vars) + (batch ? batch->count : 0);
    struct vars_format format = {.vars = calloc(most + 1, sizeof *format.vars)};
    if (!format.vars)
        return -ERR_NO_MEMORY;
    vars_walk(vars, batch, vars_format_one, &format);
    env_file_format(out, format.vars, format.count, vars->kept.data ? vars->kept.data : "",
                    vars->kept.len);
    free(format.vars);
    return out->failed;
}

static void vars_start_batch(struct vars *vars);
static void vars_attach_step(struct vars *vars);

/* The batch has its verdict. */
static void vars_batch_end(struct vars *vars, int status) {
    struct vars_batch *batch = vars->flight;
    vars->flight = NULL;
    if (status == 0) {
        for (size_t i = 0; i < batch->count && status == 0; i++) {
            const struct vars_commit_change *c = batch->overlay[i];
            if (c->bytes)
                status = vars_set(vars, c->name, c->bytes, c->length);
            else
                vars_unset(vars, c->name);
        }
        if (batch->to_guest)
            vars->guest_generation = vars->generation;
    }
    vars_project(vars);
    struct list commits;
    list_init(&commits);
    list_splice(&commits, &batch->commits);
    bool to_guest = batch->to_guest;
    free(batch);
    if (to_guest && status == 0 && !list_is_empty(&commits))
        vm_save(vars->vm);
    commits_end(&commits, status);
    vars_start_batch(vars);
    vars_attach_step(vars);
}

/* One line of what a guest printed, for a sentence. */
static int guest_words(const char *output, size_t length) {
    const char *end = memchr(output, '\n', length);
    size_t n = end ? (size_t)(end - output) : length;
    return n > 200 ? 200 : (int)n;
}

static void vars_updated(void *arg, int status, const char *output, size_t length) {
    struct vars_batch *batch = arg;
    struct vars *vars = batch->vars;
    if (!vars) {
        free(batch);
        return;
    }
    if (status == 0) {
        vars->learned = uv_now(vars->vm->daemon->loop);
    } else if (status > 0) {
        vm_fail(vars->vm, -ERR_IO, "writing %s in the guest failed: %.*s; the variables are unchanged",
                GUEST_ENV_FILE, guest_words(output, length), output);
        status = memmem(output, length, "No space", 8) ? -ERR_NO_ROOM : -ERR_IO;
    }
    vars_batch_end(vars, status);
}

static int vars_send(struct vars *vars, struct vars_batch *batch) {
    cleanup_buf struct buf text = {0}, script = {0};
    int r = vars_format(vars, batch, &text);
    if (r == 0) {
        vars->vm->guest->file_replace(&script, GUEST_ENV_FILE, text.data, text.len);
        r = script.failed;
    }
    if (r == 0)
        r = control_request(vars->vm->control, &script, vars_updated, batch);
    if (text.data)
        explicit_bzero(text.data, text.len);
    if (script.data)
        explicit_bzero(script.data, script.len);
    vars->updates += r == 0;
    return r;
}

static void vars_start_batch(struct vars *vars) {
    if (vars->flight || list_is_empty(&vars->queued))
        return;
    struct vars_batch *batch = batch_new(vars);
    if (!batch) {
        struct list failed;
        list_init(&failed);
        list_splice(&failed, &vars->queued);
        commits_end(&failed, -ERR_NO_MEMORY);
        return;
    }
    vars->flight = batch;
    batch->to_guest = vars->vm->state == VM_RUNNING;
    if (!batch->to_guest) {
        vm_save(vars->vm); /* vars_saved() has the verdict */
        return;
    }
    int r = vars_send(vars, batch);
    if (r < 0)
        vars_batch_end(vars, r);
}

bool vars_wants_saving(const struct vars *vars) {
    return vars_disk_batch(vars) != NULL;
}

void vars_saved(struct vars *vars, int status) {
    if (vars_disk_batch(vars))
        vars_batch_end(vars, status);
}

int vars_refuse_reserved(struct vm *vm, const char *name) {
    return vm_fail(vm, -ERR_INVALID,
                   "env/%s: the guest's shells keep this name for themselves, and setting it would end "
                   "them",
                   name);
}

static int vars_check(struct vars *vars, const struct var_change *changes, size_t count,
                      ssize_t *ret_growth) {
    struct vm *vm = vars->vm;
    ssize_t growth = 0;
    for (size_t i = 0; i < count; i++) {
        const struct var_change *c = &changes[i];
        if (!c->bytes) {
            growth -= (ssize_t)vars_pending_size(vars, c->name);
            continue;
        }
        if (vm->guest->name_is_reserved(c->name) && !vars_pending_size(vars, c->name))
            return vars_refuse_reserved(vm, c->name);
        if (memchr(c->bytes, 0, c->length))
            return vm_fail(vm, -ERR_INVALID,
                           "env/%s: the value has a NUL byte, which no environment variable can hold",
                           c->name);
        if (strlen(c->name) + var_value_length(c->bytes, c->length) > VAR_LIMIT)
            return vm_fail(vm, -ERR_TOO_LARGE, "env/%s: a value takes %d bytes at most, with its name",
                           c->name, VAR_LIMIT);
        growth += (ssize_t)change_size(c->name, c->bytes, c->length) -
                  (ssize_t)vars_pending_size(vars, c->name);
    }
    if (growth > 0 && vars->projected + (size_t)growth > VARS_LIMIT)
        return vm_fail(vm, -ERR_NO_ROOM,
                       "env/%s: the variables of a VM take %d bytes at most, all together; remove some",
                       changes[0].name, VARS_LIMIT);
    *ret_growth = growth;
    return 0;
}

static int vars_check_state(struct vars *vars) {
    switch (vars->vm->state) {
    case VM_RUNNING:
    case VM_BOOTING:
    case VM_STOPPED:
    case VM_FAILED:
        return 0;
    default:
        return vm_check_running(vars->vm);
    }
}

int vars_commit(struct vars *vars, const struct var_change *changes, size_t count,
                struct vm_wait *wait) {
    ssize_t growth = 0;
    if (vars->vm->gone)
        return -ERR_GONE;
    int r = vars_check_state(vars);
    if (r == 0)
        r = vars_check(vars, changes, count, &growth);
    if (r < 0)
        return r;
    struct vars_commit *commit = commit_new(changes, count);
    if (!commit)
        return -ERR_NO_MEMORY;
    vars->projected = (size_t)((ssize_t)vars->projected + growth);
    vars->commits++;
    if (wait)
        list_append(&commit->wait, &wait->link);
    list_append(&vars->queued, &commit->link);
    vars_start_batch(vars);
    return 0;
}

static void vars_read(void *arg, int status, const char *output, size_t length) {
    struct vm *vm = arg;
    struct vars *vars = vm->vars;
    if (!vm->gone && vars->refreshing) {
        vars->refreshing = false;
        if (status > 0)
            status = vm_fail(vm, -ERR_IO, "reading %s in the guest failed: %.*s", GUEST_ENV_FILE,
                             guest_words(output, length), output);
        /* An update that is under way is newer than what was read before it. */
        if (status == 0 && !vars->flight)
            status = vars_learn(vars, output, length);
        if (status == 0) {
            vars->learned = uv_now(vm->daemon->loop);
            vars->guest_generation = vars->generation;
        }
        vars_project(vars);
        vm_wait_wake(&vars->refresh_waits, status);
        if (vars->attached) {
            void (*attached)(struct vm *, int) = vars->attached;
            vars->attached = NULL;
            attached(vm, status);
        }
    }
    vm_unref(vm);
}

static int vars_start_reading(struct vars *vars) {
    cleanup_buf struct buf script = {0};
    vars->vm->guest->file_read(&script, GUEST_ENV_FILE);
    if (script.failed)
        return -ERR_NO_MEMORY;
    int r = control_request(vars->vm->control, &script, vars_read, vars->vm);
    if (r < 0)
        return r;
    vm_ref(vars->vm);
    vars->refreshing = true;
    return 0;
}

int vars_refresh(struct vars *vars, struct vm_wait *wait) {
    struct vm *vm = vars->vm;
    if (vm->gone)
        return -ERR_GONE;
    if (vm->state == VM_UNREACHABLE)
        return vm_check_running(vm);
    if (vm->state != VM_RUNNING)
        return 1;
    if (vars->flight || uv_now(vm->daemon->loop) - vars->learned < VAR_FRESH_MS)
        return 1;
    int r = vars->refreshing ? 0 : vars_start_reading(vars);
    if (r == 0)
        list_append(&vars->refresh_waits, &wait->link);
    return r;
}

int vars_inject(struct vars *vars, struct buf *out) {
    /* A batch on its way to the disk is not in yet: it will raise the generation. */
    vars->guest_generation = vars->generation;
    return vars_format(vars, NULL, out);
}

/* After a boot: sends the table for as long as it is not what the guest has. */
static void vars_attach_sent(void *arg, int status, const char *output, size_t length) {
    struct vm *vm = arg;
    struct vars *vars = vm->vars;
    if (!vm->gone && vars->attached) {
        if (status > 0)
            status = vm_fail(vm, -ERR_IO, "writing %s in the guest failed: %.*s", GUEST_ENV_FILE,
                             guest_words(output, length), output);
        if (status == 0) {
            vars_attach_step(vars);
        } else {
            void (*attached)(struct vm *, int) = vars->attached;
            vars->attached = NULL;
            attached(vm, status);
        }
    }
    vm_unref(vm);
}

static void vars_attach_step(struct vars *vars) {
    void (*attached)(struct vm *, int) = vars->attached;
    struct vm *vm = vars->vm;
    if (!attached || vars->refreshing || vars->flight)
        return;
    if (vars->guest_generation == vars->generation) {
        vars->attached = NULL;
        vars->learned = uv_now(vm->daemon->loop);
        attached(vm, 0);
        return;
    }
    cleanup_buf struct buf text = {0}, script = {0};
    vars->guest_generation = vars->generation;
    int r = vars_format(vars, NULL, &text);
    if (r == 0)
        vm->guest->file_replace(&script, GUEST_ENV_FILE, text.data, text.len);
    if (r == 0 && !script.failed)
        r = control_request(vm->control, &script, vars_attach_sent, vm);
    if (r == 0) {
        vm_ref(vm);
        return;
    }
    vars->attached = NULL;
    attached(vm, r);
}

void vars_attach(struct vars *vars, bool booted, void (*done)(struct vm *vm, int status)) {
    vars->attached = done;
    if (booted) {
        vars_attach_step(vars);
        return;
    }
    int r = vars_start_reading(vars);
    if (r < 0) {
        vars->attached = NULL;
        done(vars->vm, r);
    }
}

void vars_fail_all(struct vars *vars, int status) {
    struct list failed;
    list_init(&failed);
    vars->attached = NULL;
    vars->refreshing = false;
    if (vars->flight) {
        struct vars_batch *batch = vars->flight;
        vars->flight = NULL;
        list_splice(&failed, &batch->commits);
        if (batch->to_guest)
            batch->vars = NULL; /* freed by vars_updated() */
        else
            free(batch);
    }
    list_splice(&failed, &vars->queued);
    vars->projected = vars->total;
    commits_end(&failed, status);
    vm_wait_wake(&vars->refresh_waits, status);
}

void vars_detach(struct vars *vars, int status) {
    if (vars_disk_batch(vars))
        return; /* what is on its way to the disk arrives there */
    vars_fail_all(vars, status);
    vars->learned = 0;
}
