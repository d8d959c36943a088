#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/vars_internal.h"

/* What is asked for (commits), and what all that goes together does to each variable (a batch). */

void vars_commit_free(struct vars_commit *commit) {
    for (size_t i = 0; i < commit->count; i++) {
        free(commit->changes[i].name);
        if (commit->changes[i].bytes)
            explicit_bzero(commit->changes[i].bytes, commit->changes[i].length);
        free(commit->changes[i].bytes);
    }
    free(commit);
}

struct vars_commit *vars_commit_new(const struct var_change *changes, size_t count) {
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
            vars_commit_free(commit);
            return NULL;
        }
    }
    return commit;
}

/* Visits every pending change of `name`, in order; NULL: everything is replaced, so it is unset. */
void vars_each_pending(const struct vars *vars, const char *name,
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

static int change_compare(const void *a, const void *b) {
    const struct vars_commit_change *const *x = a, *const *y = b;
    int order = strcmp((*x)->name, (*y)->name);
    return order ? order : (*x)->order < (*y)->order ? -1 : 1;
}

void vars_batch_free(struct vars_batch *batch) {
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

struct vars_batch *vars_batch_new(struct vars *vars, struct list *commits) {
    size_t count = 0;
    for (struct list *l = commits->next; l != commits; l = l->next)
        count += LIST_OWNER(l, struct vars_commit, link)->count;
    struct vars_batch *batch = calloc(1, sizeof *batch + count * sizeof *batch->overlay);
    cleanup_free struct vars_commit_change **changes = calloc(count + 1, sizeof *changes);
    if (!batch || !changes) {
        free(batch);
        return NULL;
    }
    batch->vars = vars;
    list_init(&batch->commits);
    list_splice(&batch->commits, commits);
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
    list_splice(commits, &batch->commits);
    vars_batch_free(batch);
    return NULL;
}

const struct vars_batch *vars_disk_batch(const struct vars *vars) {
    return vars->flight && !vars->flight->to_guest ? vars->flight : NULL;
}

/* Visits a variable as it will be. */
int vars_effect_show(const struct vars_effect *effect, const struct var *var,
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
            r = vars_effect_show(&batch->overlay[at++], order == 0 ? var : NULL, visit, arg);
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
