#include <stdlib.h>
#include <string.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/vars_internal.h"

/* What has been acknowledged and is not done yet.
 *
 * A text comes in one WRITE or in many and is to take effect as one, at FLUSH; but a shell hears of
 * no error that comes later than that of a write(). So at the first WRITE the guest is asked
 * whether it would take the text: it writes the file that would be, beside the one that is, and
 * removes it again; then it puts the one that is in its own place by rename, which a mount on it or
 * an attribute may forbid. And the record says what has been promised. If FLUSH is late, or never
 * comes because the daemon or the connection ends before, it is done all the same. But of what may
 * be the first of many lines the variables are merged: then they are there, and no other is lost
 * for a text that was not complete. */

#define VARS_PROMISE_MS 100 /* FLUSH is late after that */

struct vars_promise {
    struct list link; /* in vars->promises */
    struct vars *vars;
    struct vars_commit *commit; /* what is to be done; NULL: nothing any more */
    bool whole;                 /* what it does not name is unset; else it is merged */
    struct list waits;          /* of vm_wait: who has asked for it */
    unsigned asked;             /* answers to come: the guest's and the disk's, or of its merging */
    int status;                 /* the first bad one */
    bool owned;                 /* somebody will yet settle or leave it */
    bool kept;                  /* it is done */
    bool keeping;               /* promise_keep() is at it: it is not freed */
    struct vm_wait saved;
    struct vm_wait rewritten;
    struct vm_wait merged;
    uv_timer_t *timer;
};

static void promise_free_unused(struct vars_promise *p) {
    if (!p->owned && !p->asked && !p->commit && !p->keeping)
        free(p);
}

static void promise_end(struct vars_promise *p) {
    list_remove(&p->link);
    if (p->commit)
        vars_commit_free(p->commit);
    p->commit = NULL;
    if (p->timer)
        uv_close((uv_handle_t *)p->timer, (uv_close_cb)free);
    p->timer = NULL;
}

static void promise_dropped(struct vars *vars) {
    vars->dropped++;
    vm_save(vars->vm);
}

/* It leaves the record at once: when a daemon that was killed has left it there, it is merged, and
 * would undo what has been acknowledged since. */
static void promise_end_saved(struct vars_promise *p) {
    bool recorded = p->commit;
    promise_end(p);
    if (recorded)
        promise_dropped(p->vars);
}

static void promise_merged(struct vm_wait *wait, int status) {
    struct vars_promise *p = LIST_OWNER(wait, struct vars_promise, merged);
    bool again = status == -ERR_UNREACHABLE || status == -ERR_TIMED_OUT;
    p->kept = status == 0;
    p->asked--;
    if (!p->owned && !again)
        promise_end_saved(p);
    promise_free_unused(p);
}

static void promise_commit(struct vars_promise *p) {
    struct vars *vars = p->vars;
    size_t count = p->commit->count;
    cleanup_free struct var_change *changes = calloc(count + 1, sizeof *changes);
    for (size_t i = 0; changes && i < count; i++)
        changes[i] = (struct var_change){.name = p->commit->changes[i].name,
                                         .bytes = p->commit->changes[i].bytes,
                                         .length = p->commit->changes[i].length};
    p->merged.done = promise_merged;
    list_init(&p->merged.link);
    p->asked++;
    struct vars_promise *around = vars->keeping;
    vars->keeping = p;
    int r = !changes   ? -ERR_NO_MEMORY
            : p->whole ? vars_replace(vars, changes, count, &p->merged)
                       : vars_commit(vars, changes, count, &p->merged);
    vars->keeping = around;
    if (r < 0)
        promise_merged(&p->merged, r);
}

/* Frees it, if that was all. */
static void promise_keep(struct vars_promise *p) {
    p->keeping = true;
    if (p->commit && !p->kept && !p->asked && vars_check_state(p->vars) == 0) {
        if (p->commit->count || p->whole)
            promise_commit(p);
        else if (!p->owned) /* others have set all of it since */
            promise_end_saved(p);
    }
    p->keeping = false;
    promise_free_unused(p);
}

static void promise_is_late(uv_timer_t *timer) {
    promise_keep(timer->data);
}

static void promise_answered(struct vars_promise *p, int status) {
    p->asked--;
    if (status < 0 && p->status == 0)
        p->status = status;
    if (p->asked)
        return;
    if (p->status == 0 && p->timer)
        uv_timer_start(p->timer, promise_is_late, VARS_PROMISE_MS, 0);
    struct list waits;
    list_init(&waits);
    list_splice(&waits, &p->waits);
    status = p->status;
    promise_free_unused(p);
    vm_wait_wake(&waits, status);
}

static void promise_saved(struct vm_wait *wait, int status) {
    struct vars_promise *p = LIST_OWNER(wait, struct vars_promise, saved);
    if (status < 0 && p->commit && !p->vars->vm->gone)
        vm_fail(p->vars->vm, status,
                "environ: what was written could not be recorded in %s/vm.json", p->vars->vm->dir);
    promise_answered(p, status);
}

static void promise_probed(void *arg, int status, const char *output, size_t length) {
    struct vars_promise *p = arg;
    struct vm *vm = p->vars->vm;
    if (status > 0)
        status = vars_explain(p->vars, "writing", status, output, length);
    promise_answered(p, status);
    vm_unref(vm);
}

static void promise_rewritten(struct vm_wait *wait, int status) {
    promise_answered(LIST_OWNER(wait, struct vars_promise, rewritten), status);
}

static int promise_probe(struct vars_promise *p, bool replace) {
    struct vars *vars = p->vars;
    struct vm *vm = vars->vm;
    cleanup_buf struct buf text = {0}, script = {0};
    struct list alone;
    list_init(&alone);
    p->commit->replace = replace;
    list_append(&alone, &p->commit->link);
    struct vars_batch *batch = vars_batch_new(vars, &alone);
    int r = batch ? vars_format(vars, batch, &text) : -ERR_NO_MEMORY;
    list_remove(&p->commit->link);
    p->commit->replace = false;
    if (batch)
        vars_batch_free(batch);
    if (r == 0) {
        vm->guest->env_probe(&script, vm->config.env_file, text.data, text.len);
        r = script.failed ? script.failed
                          : control_request(vm->control, &script, promise_probed, p);
    }
    if (text.data)
        explicit_bzero(text.data, text.len);
    if (script.data)
        explicit_bzero(script.data, script.len);
    if (r < 0)
        return r;
    vm_ref(vm);
    p->asked++;
    return 0;
}

/* The guest is asked. */
static int promise_ask(struct vars_promise *p, bool replace) {
    struct vars *vars = p->vars;
    if (!vars->absent) {
        p->rewritten.done = promise_rewritten;
        list_init(&p->rewritten.link);
        p->asked++; /* it may be answered at once */
        int r = vars_rewrite(vars, &p->rewritten);
        if (r < 0) {
            p->asked--;
            return r;
        }
    }
    return promise_probe(p, replace);
}

static struct vars_promise *promise_new(struct vars *vars, const struct var_change *changes,
                                        size_t count, bool whole) {
    struct vars_promise *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->vars = vars;
    p->whole = whole;
    list_init(&p->waits);
    list_append(&vars->promises, &p->link);
    p->commit = vars_commit_new(changes, count);
    p->timer = malloc(sizeof *p->timer);
    if (p->timer) {
        uv_timer_init(vars->vm->daemon->loop, p->timer);
        p->timer->data = p;
    }
    if (p->commit && p->timer)
        return p;
    promise_end(p);
    free(p);
    return NULL;
}

int vars_promise(struct vars *vars, const struct var_change *changes, size_t count, bool replace,
                 bool whole, struct vm_wait *wait, struct vars_promise **ret_promise) {
    ssize_t growth;
    int r = vars_check(vars, changes, count, replace, &growth);
    if (r < 0)
        return r;
    struct vars_promise *p = promise_new(vars, changes, count, whole);
    if (!p)
        return -ERR_NO_MEMORY;
    if (vars_go_to_guest(vars) && (r = promise_ask(p, replace)) < 0) {
        promise_end(p);
        promise_free_unused(p);
        return r;
    }
    p->owned = true;
    *ret_promise = p;
    list_append(&p->waits, &wait->link);
    p->asked++;
    p->saved.done = promise_saved;
    list_init(&p->saved.link);
    vm_save_for(vars->vm, &p->saved);
    return 0;
}

void vars_promise_go_on(struct vars_promise *promise) {
    if (promise->timer && uv_is_active((uv_handle_t *)promise->timer))
        uv_timer_start(promise->timer, promise_is_late, VARS_PROMISE_MS, 0);
}

int vars_promise_fulfil(struct vars_promise *promise, const struct var_change *changes,
                        size_t count, bool replace, struct vm_wait *wait) {
    struct vars *vars = promise->vars;
    if (promise->timer)
        uv_timer_stop(promise->timer);
    promise->keeping = true;
    int r = replace ? vars_replace(vars, changes, count, wait)
                    : vars_commit(vars, changes, count, wait);
    promise->keeping = false;
    return r;
}

void vars_promise_settle(struct vars_promise *promise) {
    promise->owned = false;
    promise_end_saved(promise);
    promise_free_unused(promise);
}

void vars_promise_leave(struct vars_promise *promise) {
    if (promise->kept || promise->status < 0) {
        vars_promise_settle(promise);
        return;
    }
    promise->owned = false;
    promise_keep(promise);
}

void vars_keep_promises(struct vars *vars) {
    struct list *next;
    for (struct list *l = vars->promises.next; l != &vars->promises; l = next) {
        struct vars_promise *p = LIST_OWNER(l, struct vars_promise, link);
        if (p == vars->keeping)
            return; /* those behind it were made later */
        next = l->next;
        if (!p->owned)
            promise_keep(p); /* may free it, and those before it */
    }
}

bool vars_promises_are_kept_now(const struct vars *vars) {
    for (const struct list *l = vars->promises.next; l != &vars->promises; l = l->next) {
        const struct vars_promise *p = LIST_OWNER(l, struct vars_promise, link);
        if (!p->owned && p->asked && !p->kept)
            return true;
    }
    return false;
}

static bool commit_names(const struct vars_commit *commit, const char *name) {
    for (size_t i = 0; i < commit->count; i++)
        if (strcmp(commit->changes[i].name, name) == 0)
            return true;
    return false;
}

static void promise_drop(struct vars_promise *p, const struct vars_commit *commit) {
    size_t kept = 0;
    for (size_t i = 0; i < p->commit->count; i++) {
        struct vars_commit_change *c = &p->commit->changes[i];
        bool drop = commit->replace || commit_names(commit, c->name);
        if (drop) {
            free(c->name);
            if (c->bytes)
                explicit_bzero(c->bytes, c->length);
            free(c->bytes);
        } else {
            p->commit->changes[kept++] = *c;
        }
    }
    bool changed = kept < p->commit->count || p->whole;
    p->commit->count = kept;
    p->whole = false; /* what has come since stays */
    if (changed)
        promise_dropped(p->vars);
}

void vars_supersede_promises(struct vars *vars, const struct vars_commit *commit) {
    for (struct list *l = vars->promises.next; l != &vars->promises; l = l->next) {
        struct vars_promise *p = LIST_OWNER(l, struct vars_promise, link);
        if (p == vars->keeping)
            return; /* those behind it were made later */
        if (!p->keeping)
            promise_drop(p, commit);
    }
}

static void promise_apply(struct vars_promise *p) {
    struct vars *vars = p->vars;
    struct var *var, *next;
    for (var = p->whole ? RB_MIN(var_index, &vars->index) : NULL; var; var = next) {
        next = RB_NEXT(var_index, &vars->index, var);
        if (!commit_names(p->commit, var->name))
            vars_unset(vars, var->name);
    }
    for (size_t i = 0; i < p->commit->count; i++) {
        const struct vars_commit_change *c = &p->commit->changes[i];
        vars_set(vars, c->name, c->bytes, c->length);
    }
    vars->owned = true;
    promise_end(p);
}

void vars_apply_promises(struct vars *vars) {
    struct list *next;
    for (struct list *l = vars->promises.next; l != &vars->promises; l = next) {
        struct vars_promise *p = LIST_OWNER(l, struct vars_promise, link);
        next = l->next;
        if (!p->owned)
            promise_apply(p);
        promise_free_unused(p);
    }
    vars_project(vars);
}

void vars_shut_promises(struct vars *vars) {
    struct list *l;
    while ((l = list_pop(&vars->promises))) {
        struct vars_promise *p = LIST_OWNER(l, struct vars_promise, link);
        promise_end(p);
        promise_free_unused(p);
    }
}

static json_t *promise_save(const struct vars_promise *p) {
    json_t *list = json_array();
    for (size_t i = 0; list && i < p->commit->count; i++) {
        const struct vars_commit_change *c = &p->commit->changes[i];
        if (json_array_append_new(list, vars_save_bytes(c->name, c->bytes, c->length)) < 0) {
            json_decref(list);
            return NULL;
        }
    }
    return json_pack("{s:b, s:o}", "whole", p->whole, "variables", list);
}

int vars_save_promises(const struct vars *vars, json_t *record) {
    json_t *list = json_array();
    int r = list ? 0 : -ERR_NO_MEMORY;
    for (const struct list *l = vars->promises.next; r == 0 && l != &vars->promises; l = l->next) {
        const struct vars_promise *p = LIST_OWNER(l, struct vars_promise, link);
        if (p->status == 0 && json_array_append_new(list, promise_save(p)) < 0)
            r = -ERR_NO_MEMORY;
    }
    if (r == 0 && json_array_size(list) && json_object_set(record, "promised", list) < 0)
        r = -ERR_NO_MEMORY;
    json_decref(list);
    return r;
}

static int promise_load(struct vars *vars, const json_t *saved) {
    const json_t *list = json_object_get(saved, "variables");
    size_t count = json_array_size(list);
    cleanup_free struct var_change *changes = calloc(count + 1, sizeof *changes);
    cleanup_free struct buf *values = calloc(count + 1, sizeof *values);
    int r = changes && values ? 0 : -ERR_NO_MEMORY;
    for (size_t i = 0; r == 0 && i < count; i++) {
        r = vars_load_bytes(json_array_get(list, i), &changes[i].name, &values[i]);
        changes[i].bytes = values[i].data ? values[i].data : "";
        changes[i].length = values[i].len;
    }
    bool whole = json_is_true(json_object_get(saved, "whole"));
    if (r == 0 && !promise_new(vars, changes, count, whole))
        r = -ERR_NO_MEMORY;
    for (size_t i = 0; values && i < count; i++) {
        if (values[i].data)
            explicit_bzero(values[i].data, values[i].len);
        buf_free(&values[i]);
    }
    return r;
}

int vars_load_promises(struct vars *vars, const json_t *record) {
    size_t i;
    json_t *one;
    int r = 0;
    json_array_foreach(json_object_get(record, "promised"), i, one) {
        int one_r = promise_load(vars, one);
        r = one_r < 0 ? one_r : r;
    }
    return r;
}
