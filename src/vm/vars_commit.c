#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/vars_internal.h"

/* How changes take effect. Commits that come while a batch is under way are queued and become the
 * next batch, whose changes are laid over the table (the overlay), sent as one, and put into the
 * table only when the verdict is success. So the table never shows what was not acknowledged, and a
 * failure leaves it as it was. */

struct vars_commit {
    struct list link; /* in vars->queued or batch->commits */
    struct list wait; /* of vm_wait: who has asked for it, and vars_await() */
    bool replace;     /* what is not among the changes is unset */
    size_t count;
    struct vars_commit_change {
        char *name;
        char *bytes; /* NULL: unset */
        size_t length;
        bool append;  /* to what is there by then */
        size_t order; /* among the changes of a batch */
    } changes[];
};

/* What all changes of a batch together do to one variable. */
struct vars_effect {
    const char *name; /* of a change */
    bool set;         /* else it is unset */
    bool onto;        /* the bytes come behind those of the table */
    struct buf bytes;
};

struct vars_batch {
    struct vars *vars; /* NULL: the VM is gone, only the answer is still to come */
    struct list commits;
    bool to_guest; /* else to the disk */
    bool replace;  /* what is not in the overlay is unset */
    size_t count;
    struct vars_effect overlay[]; /* sorted by name, each name once */
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
        c->append = changes[i].append;
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

/* Visits every pending change of `name`, in order; NULL: everything is replaced, so it is unset. */
static void vars_each_pending(const struct vars *vars, const char *name,
                              void (*visit)(void *arg, const struct vars_commit_change *change),
                              void *arg) {
    const struct list *heads[] = {vars->flight ? &vars->flight->commits : NULL, &vars->queued};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++)
        for (struct list *l = heads[i] ? heads[i]->next : NULL; l && l != heads[i]; l = l->next) {
            const struct vars_commit *commit = LIST_OWNER(l, struct vars_commit, link);
            if (commit->replace)
                visit(arg, NULL);
            for (size_t c = 0; c < commit->count; c++)
                if (strcmp(commit->changes[c].name, name) == 0)
                    visit(arg, &commit->changes[c]);
        }
}

static void effect_apply(struct vars_effect *effect, const struct vars_commit_change *change) {
    if (!change || !change->append) {
        buf_clear(&effect->bytes);
        effect->onto = false;
    }
    effect->set = change && change->bytes;
    if (effect->set)
        buf_append(&effect->bytes, change->bytes, change->length);
}

static void effect_visit(void *arg, const struct vars_commit_change *change) {
    effect_apply(arg, change);
}

static void effect_free(struct vars_effect *effect) {
    if (effect->bytes.data)
        explicit_bzero(effect->bytes.data, effect->bytes.len);
    buf_free(&effect->bytes);
}

static bool commit_changes(const struct vars_commit *commit, const char *name) {
    for (size_t i = 0; name && !commit->replace && i < commit->count; i++)
        if (strcmp(commit->changes[i].name, name) == 0)
            return true;
    return !name || commit->replace;
}

bool vars_await(struct vars *vars, const char *name, struct vm_wait *wait) {
    struct list *heads[] = {&vars->queued, vars->flight ? &vars->flight->commits : NULL};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++)
        for (struct list *l = heads[i] ? heads[i]->prev : NULL; l && l != heads[i]; l = l->prev) {
            struct vars_commit *commit = LIST_OWNER(l, struct vars_commit, link);
            if (!commit_changes(commit, name))
                continue;
            list_append(&commit->wait, &wait->link);
            return true;
        }
    return false;
}

bool vars_newest(struct vars *vars, const char *name, struct buf *out) {
    const struct var *var = vars_find(vars, name);
    struct vars_effect effect = {.name = name, .set = var && var->set};
    if (effect.set)
        buf_append(&effect.bytes, var->bytes, var->length);
    vars_each_pending(vars, name, effect_visit, &effect);
    if (effect.set)
        buf_append(out, effect.bytes.data, effect.bytes.len);
    out->failed |= effect.bytes.failed;
    effect_free(&effect);
    return effect.set;
}

/* Bytes of the value; -1: unset. */
struct vars_size {
    ssize_t length;
};

static void size_visit(void *arg, const struct vars_commit_change *change) {
    struct vars_size *size = arg;
    if (!change || !change->bytes)
        size->length = -1;
    else if (change->append && size->length > 0)
        size->length += (ssize_t)change->length;
    else
        size->length = (ssize_t)change->length;
}

ssize_t vars_newest_length(const struct vars *vars, const char *name) {
    const struct var *var = vars_find((struct vars *)(uintptr_t)vars, name);
    struct vars_size size = {var && var->set ? (ssize_t)var->length : -1};
    vars_each_pending(vars, name, size_visit, &size);
    return size.length;
}

/* For a commit of `count` changes. Looking through all that is pending for each of many would take
 * its square; they are counted as if nothing were pending, which is near enough for a limit. */
#define VARS_MANY 64

static ssize_t vars_expected_length(const struct vars *vars, const char *name, size_t count) {
    if (count <= VARS_MANY)
        return vars_newest_length(vars, name);
    const struct var *var = vars_find((struct vars *)(uintptr_t)vars, name);
    return var && var->set ? (ssize_t)var->length : -1;
}

static size_t sized(const char *name, ssize_t length) {
    return length < 0 ? 0 : strlen(name) + (size_t)length;
}

/* What is pending has changed in an unforeseen way (a batch has failed, the guest's file was
 * changed): count anew. */
void vars_project(struct vars *vars) {
    struct list pending, *link;
    list_init(&pending);
    list_splice(&pending, &vars->queued);
    vars->projected = vars->total;
    while ((link = list_pop(&pending))) {
        struct vars_commit *commit = LIST_OWNER(link, struct vars_commit, link);
        if (commit->replace)
            vars->projected = 0;
        for (size_t i = 0; i < commit->count; i++) {
            const struct vars_commit_change *c = &commit->changes[i];
            struct vars_size size = {
                commit->replace ? -1 : vars_expected_length(vars, c->name, commit->count)};
            vars->projected -= sized(c->name, size.length);
            size_visit(&size, c);
            vars->projected += sized(c->name, size.length);
        }
        list_append(&vars->queued, &commit->link);
    }
}

static int change_compare(const void *a, const void *b) {
    const struct vars_commit_change *const *x = a, *const *y = b;
    int order = strcmp((*x)->name, (*y)->name);
    return order ? order : (*x)->order < (*y)->order ? -1 : 1;
}

static void batch_free(struct vars_batch *batch) {
    for (size_t i = 0; i < batch->count; i++)
        effect_free(&batch->overlay[i]);
    free(batch);
}

/* The changes of all commits since the last that replaces everything, by name and in their order.
 */
static size_t batch_sort(struct vars_batch *batch, struct vars_commit_change **changes) {
    size_t count = 0, order = 0;
    for (struct list *l = batch->commits.next; l != &batch->commits; l = l->next) {
        struct vars_commit *commit = LIST_OWNER(l, struct vars_commit, link);
        if (commit->replace) {
            batch->replace = true;
            count = 0;
        }
        for (size_t i = 0; i < commit->count; i++) {
            commit->changes[i].order = order++;
            changes[count++] = &commit->changes[i];
        }
    }
    if (count)
        qsort(changes, count, sizeof *changes, change_compare);
    return count;
}

/* Takes all that is queued. */
static struct vars_batch *batch_new(struct vars *vars) {
    size_t count = 0;
    for (struct list *l = vars->queued.next; l != &vars->queued; l = l->next)
        count += LIST_OWNER(l, struct vars_commit, link)->count;
    struct vars_batch *batch = calloc(1, sizeof *batch + count * sizeof *batch->overlay);
    cleanup_free struct vars_commit_change **changes = calloc(count + 1, sizeof *changes);
    if (!batch || !changes) {
        free(batch);
        return NULL;
    }
    batch->vars = vars;
    list_init(&batch->commits);
    list_splice(&batch->commits, &vars->queued);
    count = batch_sort(batch, changes);
    int failed = 0;
    for (size_t i = 0; i < count; i++) {
        struct vars_effect *effect = batch->count ? &batch->overlay[batch->count - 1] : NULL;
        if (!effect || strcmp(effect->name, changes[i]->name) != 0) {
            effect = &batch->overlay[batch->count++];
            *effect = (struct vars_effect){.name = changes[i]->name, .onto = !batch->replace};
        }
        effect_apply(effect, changes[i]);
        failed |= effect->bytes.failed;
    }
    if (!failed)
        return batch;
    list_splice(&vars->queued, &batch->commits);
    batch_free(batch);
    return NULL;
}

const struct vars_batch *vars_disk_batch(const struct vars *vars) {
    return vars->flight && !vars->flight->to_guest ? vars->flight : NULL;
}

/* Visits a variable as it will be. */
static int effect_show(const struct vars_effect *effect, const struct var *var,
                       int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
                       void *arg) {
    cleanup_buf struct buf bytes = {0};
    if (!effect->set)
        return 0;
    if (effect->onto && var && var->set)
        buf_append(&bytes, var->bytes, var->length);
    buf_append(&bytes, effect->bytes.data, effect->bytes.len);
    return bytes.failed ? bytes.failed : visit(arg, effect->name, bytes.data, bytes.len);
}

int vars_walk(const struct vars *vars, const struct vars_batch *batch,
              int (*visit)(void *arg, const char *name, const char *bytes, size_t length),
              void *arg) {
    struct var_index *index = (struct var_index *)(uintptr_t)&vars->index;
    struct var *var = RB_MIN(var_index, index);
    size_t at = 0, count = batch ? batch->count : 0;
    int r = 0;
    while (r == 0 && (var || at < count)) {
        int order = !var ? 1 : at == count ? -1 : strcmp(var->name, batch->overlay[at].name);
        if (order < 0) {
            if (var->set && !(batch && batch->replace))
                r = visit(arg, var->name, var->bytes, var->length);
        } else {
            r = effect_show(&batch->overlay[at++], order == 0 ? var : NULL, visit, arg);
        }
        if (order <= 0)
            var = RB_NEXT(var_index, index, var);
    }
    return r;
}

/* env_file_format() wants them all together. */
struct vars_format {
    struct env_var *vars;
    size_t count;
    struct buf values;
};

static int vars_format_one(void *arg, const char *name, const char *bytes, size_t length) {
    struct vars_format *format = arg;
    size_t at = format->values.len, value = var_value_length(bytes, length);
    buf_append(&format->values, bytes, value);
    /* The buffer may move: offsets, until all is there. */
    format->vars[format->count++] =
        (struct env_var){name, strlen(name), (const char *)(uintptr_t)at, value};
    return format->values.failed;
}

int vars_format(const struct vars *vars, const struct vars_batch *batch, struct buf *out) {
    size_t most = vars_count(vars) + (batch ? batch->count : 0);
    struct vars_format format = {.vars = calloc(most + 1, sizeof *format.vars)};
    int r = format.vars ? vars_walk(vars, batch, vars_format_one, &format) : -ERR_NO_MEMORY;
    for (size_t i = 0; i < format.count; i++)
        format.vars[i].value =
            format.values.data ? format.values.data + (uintptr_t)format.vars[i].value : "";
    if (r == 0)
        env_file_format(out, format.vars, format.count, vars->kept.data ? vars->kept.data : "",
                        vars->kept.len);
    if (format.values.data)
        explicit_bzero(format.values.data, format.values.len);
    buf_free(&format.values);
    free(format.vars);
    return r < 0 ? r : out->failed;
}

/* Unsets what a batch that replaces everything does not name. */
static void vars_drop_others(struct vars *vars, const struct vars_batch *batch) {
    struct var *var, *next;
    size_t at = 0;
    for (var = RB_MIN(var_index, &vars->index); var; var = next) {
        next = RB_NEXT(var_index, &vars->index, var);
        while (at < batch->count && strcmp(batch->overlay[at].name, var->name) < 0)
            at++;
        if (at == batch->count || strcmp(batch->overlay[at].name, var->name) != 0)
            vars_unset(vars, var->name);
    }
}

static int vars_take_one(void *arg, const char *name, const char *bytes, size_t length) {
    return vars_set(arg, name, bytes, length);
}

/* The batch has its verdict. */
void vars_batch_end(struct vars *vars, int status) {
    struct vars_batch *batch = vars->flight;
    vars->flight = NULL;
    vars->retries = 0;
    if (status == 0) {
        vars->owned = true;
        if (batch->replace)
            vars_drop_others(vars, batch);
        for (size_t i = 0; i < batch->count && status == 0; i++) {
            const struct vars_effect *effect = &batch->overlay[i];
            if (effect->set)
                status = effect_show(effect, vars_find(vars, effect->name), vars_take_one, vars);
            else
                vars_unset(vars, effect->name);
        }
    }
    vars_project(vars);
    struct list commits;
    list_init(&commits);
    list_splice(&commits, &batch->commits);
    bool to_guest = batch->to_guest;
    batch_free(batch);
    commits_end(&commits, status);
    if (to_guest && status == 0)
        vars_seal_soon(vars);
    if (status == 0) /* the guest has it, or the disk; their times and numbers can wait */
        vm_save_soon(vars->vm);
    vars_attach_step(vars); /* first, or writers would hold up the boot for ever */
    vars_start_batch(vars);
}

static void vars_updated(void *arg, int status, const char *output, size_t length) {
    struct vars_batch *batch = arg;
    struct vars *vars = batch->vars;
    if (!vars) {
        batch_free(batch);
        return;
    }
    if (status == GUEST_CHANGED && vars->retries++ < VARS_RETRIES) {
        /* Nothing was done. What has changed is read, and the batch laid over that. */
        int r = vars_read(vars);
        vars->rereading = r == 0;
        if (r < 0)
            vars_batch_end(vars, r);
        return;
    }
    if (status == 0) {
        vars->learned = uv_now(vars->vm->daemon->loop);
        vars->absent = false;
    }
    if (status == 0 && vars->vm->state == VM_STOPPING) {
        /* The guest has it, and is about to go: it is done when the record has it, too. */
        batch->to_guest = false;
        vm_save(vars->vm);
        return;
    }
    vars_batch_end(vars,
                   status > 0 ? vars_explain(vars, "writing", status, output, length) : status);
}

int vars_send(struct vars *vars, const struct vars_batch *batch, control_done *done, void *arg) {
    const char *path = vars->vm->config.env_file;
    cleanup_buf struct buf text = {0}, script = {0};
    int r = vars_format(vars, batch, &text);
    if (r == 0) {
        vars->vm->guest->env_replace(&script, path, text.data, text.len, vars->absent);
        r = script.failed;
    }
    if (r == 0)
        r = control_request(vars->vm->control, &script, done, arg);
    if (text.data)
        explicit_bzero(text.data, text.len);
    if (script.data)
        explicit_bzero(script.data, script.len);
    vars->updates += r == 0;
    return r;
}

void vars_resend(struct vars *vars) {
    int r = vars_send(vars, vars->flight, vars_updated, vars->flight);
    if (r < 0)
        vars_batch_end(vars, r);
}

void vars_start_batch(struct vars *vars) {
    /* What is being read now is not known yet, but would count as seen. */
    if (vars->flight || vars->refreshing || list_is_empty(&vars->queued))
        return;
    if ((vars->attached && vars->attach_read) || vars->vm->announcing)
        return; /* in a moment it can go to the guest */
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
    vars_resend(vars);
}

void vars_resume(struct vars *vars) {
    vars_start_batch(vars);
}

bool vars_wants_saving(const struct vars *vars) {
    return vars_disk_batch(vars) != NULL;
}

void vars_saved(struct vars *vars, int status) {
    if (vars_disk_batch(vars))
        vars_batch_end(vars, status);
}

int vars_refuse_nul(struct vm *vm, const char *name) {
    return vm_fail(vm, -ERR_INVALID,
                   "env/%s: the value has a NUL byte, which no environment variable can hold",
                   name);
}

int vars_refuse_length(struct vm *vm, const char *name) {
    return vm_fail(vm, -ERR_TOO_LARGE, "env/%s: a value takes %d bytes at most, with its name",
                   name, VAR_LIMIT);
}

int vars_refuse_reserved(struct vm *vm, const char *name) {
    return vm_fail(
        vm, -ERR_INVALID,
        "env/%s: the guest's shells keep this name for themselves, and setting it would end "
        "them",
        name);
}

/* One change, on a variable that has `size` before it (and after it, when it is right). */
static int vars_check_change(struct vm *vm, const struct var_change *c, struct vars_size *size) {
    struct vars_commit_change change = {
        .bytes = (char *)(uintptr_t)c->bytes, .length = c->length, .append = c->append};
    if (!env_name_is_valid(c->name, strlen(c->name)))
        return vm_fail(vm, -ERR_INVALID, "env: a variable cannot have this name");
    if (c->bytes && vm->guest->name_is_reserved(c->name) && size->length < 0)
        return vars_refuse_reserved(vm, c->name);
    if (c->bytes && memchr(c->bytes, 0, c->length))
        return vars_refuse_nul(vm, c->name);
    size_visit(size, &change);
    bool newline = c->bytes && c->length && c->bytes[c->length - 1] == '\n';
    if (size->length >= 0 && !var_fits(c->name, (size_t)size->length, newline))
        return vars_refuse_length(vm, c->name);
    return 0;
}

static int vars_check(struct vars *vars, const struct var_change *changes, size_t count,
                      bool replace, ssize_t *ret_growth) {
    ssize_t growth = replace ? -(ssize_t)vars->projected : 0;
    for (size_t i = 0; i < count; i++) {
        const struct var_change *c = &changes[i];
        struct vars_size size = {vars_expected_length(vars, c->name, count)};
        if (!replace)
            growth -= (ssize_t)sized(c->name, size.length);
        int r = vars_check_change(vars->vm, c, &size);
        if (r < 0)
            return r;
        growth += (ssize_t)sized(c->name, size.length);
    }
    if ((ssize_t)vars->projected + growth > VARS_LIMIT && (growth > 0 || replace))
        return vm_fail(
            vars->vm, -ERR_NO_ROOM,
            "env/%s: the variables of a VM take %d bytes at most, all together; remove some",
            changes[0].name, VARS_LIMIT);
    *ret_growth = growth;
    return 0;
}

static int vars_check_state(struct vars *vars) {
    switch (vars->vm->state) {
    case VM_RUNNING:
    case VM_BOOTING:
    case VM_STOPPING: /* goes to the disk, for the next boot */
    case VM_STOPPED:
    case VM_FAILED:
        return 0;
    default:
        return vm_check_running(vars->vm);
    }
}

static int vars_enqueue(struct vars *vars, const struct var_change *changes, size_t count,
                        bool replace, struct vm_wait *wait) {
    ssize_t growth = 0;
    if (vars->vm->gone)
        return -ERR_GONE;
    vm_use(vars->vm);
    int r = vars_check_state(vars);
    if (r == 0)
        r = vars_check(vars, changes, count, replace, &growth);
    if (r < 0)
        return r;
    struct vars_commit *commit = commit_new(changes, count);
    if (!commit)
        return -ERR_NO_MEMORY;
    commit->replace = replace;
    vars->projected = (size_t)((ssize_t)vars->projected + growth);
    vars->commits++;
    if (wait)
        list_append(&commit->wait, &wait->link);
    list_append(&vars->queued, &commit->link);
    vars_start_batch(vars);
    return 0;
}

int vars_commit(struct vars *vars, const struct var_change *changes, size_t count,
                struct vm_wait *wait) {
    return vars_enqueue(vars, changes, count, false, wait);
}

int vars_replace(struct vars *vars, const struct var_change *changes, size_t count,
                 struct vm_wait *wait) {
    return vars_enqueue(vars, changes, count, true, wait);
}

void vars_fail_all(struct vars *vars, int status) {
    struct list failed;
    list_init(&failed);
    vars->attached = NULL;
    vars->refreshing = false;
    vars->retries = 0;
    if (vars->flight) {
        struct vars_batch *batch = vars->flight;
        vars->flight = NULL;
        list_splice(&failed, &batch->commits);
        /* One that is with the control connection is freed by vars_updated(), which may be now:
         * when this is called for a lost connection, its requests fail after it. */
        if (batch->to_guest && !vars->rereading)
            batch->vars = NULL;
        else
            batch_free(batch);
    }
    vars->rereading = false;
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
