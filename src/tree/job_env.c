#include <string.h>

#include "guest/env_file.h"
#include "tree/job.h"
#include "tree/scratch.h"
#include "tree/tree.h"
#include "util/errors.h"

/* jobs/NAME/env/: variables for this job alone. Its files are as temporary files are
 * (tree/scratch): on this side only, until the job is started. */

static void jobenv_stat(const struct node *node, struct node_stat *ret_stat) {
    job_stat_init(node, ret_stat);
    ret_stat->st.st_nlink = 2;
}

static int jobenv_lookup(struct node *dir, const char *name, struct node **ret_node) {
    struct job *job = job_of(dir);
    struct scratch *scratch = job->removed ? NULL : scratch_find(job->env, name);
    *ret_node = scratch ? scratch_node(dir, scratch) : NULL;
    return !scratch ? -ERR_NOT_FOUND : *ret_node ? 0 : -ERR_NO_MEMORY;
}

static int jobenv_list(struct node *dir, struct node_list *list) {
    struct job *job = job_of(dir);
    return job->removed ? -ERR_NOT_FOUND : scratch_list(dir, job->env, list);
}

/* May there be a file of this name? A started job takes no more variables. */
static int jobenv_check(struct node *dir, const char *name, int flags) {
    struct job *job = job_of(dir);
    if (job->removed)
        return -ERR_NOT_FOUND;
    if (!env_name_is_valid(name, strlen(name)))
        return scratch_is_wanted(dir->vm, name, flags)
                   ? 0
                   : job_fail(dir, -ERR_INVALID,
                              "no name for a variable: it takes letters, digits and _, and starts "
                              "with no digit");
    if (dir->vm->guest->name_is_reserved(name))
        return job_fail(dir, -ERR_INVALID, "%s is reserved by the guest's shells", name);
    if (job->command)
        return job_fail(dir, -ERR_BUSY, "this job has been started already");
    return 0;
}

static void jobenv_create(struct node *dir, const char *name, int flags, mode_t mode,
                          struct request *rq) {
    int r = jobenv_check(dir, name, flags);
    if (r < 0)
        request_answer(rq, r);
    else
        scratch_create(dir, job_of(dir)->env, name, flags, mode, rq);
}

static void jobenv_mkdir(struct node *dir, const char *name, mode_t mode, struct request *rq) {
    struct job *job = job_of(dir);
    if (job->removed)
        request_answer(rq, -ERR_NOT_FOUND);
    else if (env_name_is_valid(name, strlen(name)))
        request_answer(rq, job_fail(dir, -ERR_INVALID, "a variable is no directory"));
    else
        scratch_mkdir(dir, job->env, name, mode, rq);
}

static void jobenv_rename(struct node *dir, const char *name, struct node *new_dir,
                          const char *new_name, unsigned flags, struct request *rq) {
    struct job *job = job_of(dir);
    struct scratch *scratch = job->removed ? NULL : scratch_find(job->env, name);
    struct scratch *there = job->removed ? NULL : scratch_find(job->env, new_name);
    int r = 0;
    if (new_dir != dir)
        r = -ERR_CROSS_DEVICE;
    else if (!scratch)
        r = -ERR_NOT_FOUND;
    else if (env_name_is_valid(new_name, strlen(new_name)))
        r = jobenv_check(dir, new_name, 0);
    if (r == 0 && scratch)
        r = scratch_check_guard(scratch, new_name);
    if (r == 0 && there && (flags & RENAME_EXCHANGE))
        r = scratch_check_guard(there, name);
    if (r < 0)
        request_answer(rq, r);
    else
        scratch_rename_node(dir, job->env, scratch, new_name, flags, rq);
}

static void jobenv_remove(struct node *dir, const char *name, bool directory, struct request *rq) {
    struct job *job = job_of(dir);
    struct scratch *scratch = job->removed ? NULL : scratch_find(job->env, name);
    if (scratch)
        scratch_unlink(dir, scratch, directory, rq);
    else
        request_answer(rq, -ERR_NOT_FOUND);
}

static void jobenv_unlink(struct node *dir, const char *name, struct request *rq) {
    jobenv_remove(dir, name, false, rq);
}

static void jobenv_rmdir(struct node *dir, const char *name, struct request *rq) {
    jobenv_remove(dir, name, true, rq);
}

const struct node_ops job_env_ops = {
    .stat = jobenv_stat,
    .lookup = jobenv_lookup,
    .list = jobenv_list,
    .create = jobenv_create,
    .mkdir = jobenv_mkdir,
    .rename = jobenv_rename,
    .unlink = jobenv_unlink,
    .rmdir = jobenv_rmdir,
    .setattr = node_setattr_ignore,
};
