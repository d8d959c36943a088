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

static void vars_commits_end(struct list *commits, int status) {
    struct list *link;
    while ((link = list_pop(commits))) {
        struct vars_commit *commit = LIST_OWNER(link, struct vars_commit, link);
        vm_wait_wake(&commit->wait, status);
        vars_commit_free(commit);
    }
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
                status =
                    vars_effect_show(effect, vars_find(vars, effect->name), vars_take_one, vars);
            else
                vars_unset(vars, effect->name);
        }
    }
    vars_project(vars);
    struct list commits;
    list_init(&commits);
    list_splice(&commits, &batch->commits);
    bool to_guest = batch->to_guest;
    vars_batch_free(batch);
    vars_commits_end(&commits, status);
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
        vars_batch_free(batch);
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
    const struct vm *vm = vars->vm;
    if (status == 0 && (vm->state == VM_STOPPING || (vm->pausing && !vm->resuming) ||
                        vars->dropped != vars->dropped_recorded)) {
        /* The guest has it, and is about to go, or to stand still so that nobody can ask it; or the
         * record tells of a promise that a later daemon would do over it: it is done when the
         * record has it, too. */
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
    /* A rewriting that changes nothing does not count. */
    vars->updates += r == 0 && !(batch && !batch->count && !batch->replace);
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
    if ((vars->attached && vars->attach_read && !vars->attach_keeping) || vars->vm->announcing)
        return; /* in a moment it can go to the guest */
    struct vars_batch *batch = vars_batch_new(vars, &vars->queued);
    if (!batch) {
        struct list failed;
        list_init(&failed);
        list_splice(&failed, &vars->queued);
        vars_commits_end(&failed, -ERR_NO_MEMORY);
        return;
    }
    vars->flight = batch;
    batch->to_guest = vars_go_to_guest(vars);
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

uint64_t vars_promises_dropped(const struct vars *vars) {
    return vars->dropped;
}

void vars_promises_recorded(struct vars *vars, uint64_t dropped) {
    vars->dropped_recorded = dropped;
}

void vars_saved(struct vars *vars, int status) {
    if (vars_disk_batch(vars))
        vars_batch_end(vars, status);
}

static int vars_enqueue(struct vars *vars, const struct var_change *changes, size_t count,
                        bool replace, struct vm_wait *wait) {
    ssize_t growth = 0;
    vars_keep_promises(vars); /* they were made before */
    int r = vars_check(vars, changes, count, replace, &growth);
    if (r < 0)
        return r;
    struct vars_commit *commit = vars_commit_new(changes, count);
    if (!commit)
        return -ERR_NO_MEMORY;
    commit->replace = replace;
    vars->projected = (size_t)((ssize_t)vars->projected + growth);
    vars->commits++;
    if (wait)
        list_append(&commit->wait, &wait->link);
    list_append(&vars->queued, &commit->link);
    vars_supersede_promises(vars, commit);
    vars_start_batch(vars);
    return 0;
}

int vars_rewrite(struct vars *vars, struct vm_wait *wait) {
    struct vars_commit *commit = vars_commit_new(NULL, 0);
    if (!commit)
        return -ERR_NO_MEMORY;
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
            vars_batch_free(batch);
    }
    vars->rereading = false;
    list_splice(&failed, &vars->queued);
    vars->projected = vars->total;
    vars_commits_end(&failed, status);
    vm_wait_wake(&vars->refresh_waits, status);
}

void vars_detach(struct vars *vars, int status) {
    vars->attached = NULL;
    vars->attach_keeping = false;
    if (vars_disk_batch(vars))
        return; /* what is on its way to the disk arrives there */
    vars_fail_all(vars, status);
    vars->learned = 0;
}
