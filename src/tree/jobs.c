#include <stdlib.h>
#include <string.h>

#include "tree/job.h"
#include "tree/scratch.h"
#include "tree/tree.h"
#include "util/errors.h"

/* ID/jobs/: a directory for each job. mkdir makes one, rmdir ends and forgets it.
 *
 * `.clone` is Plan 9's: opening it makes a new job, reading it gives the job's name, and the job
 * lives as long as the file is open. So a program that is killed leaves no job behind. */

static const struct node_row jobs_clone = {".clone", S_IFREG | 0400, &job_clone_ops, NULL};

static void jobs_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, vmdir_slot(node->row));
    ret_stat->st.st_mode = node->row->mode;
    ret_stat->st.st_nlink = 2;
    if (!node->vm->gone)
        ret_stat->st.st_mtim = ret_stat->st.st_ctim = *jobs_changed(node->vm->jobs);
    ret_stat->attr_seconds = NODE_BRIEF_SECONDS;
}

static void job_free_node(struct node *node) {
    if (node->object)
        job_unref(node->object);
    node->object = NULL;
}

struct node *job_node(struct node *dir, struct job *job) {
    struct node *known = node_find_child(dir, job->name);
    if (known && known->object != job)
        node_forget_child(dir, job->name);
    struct node *node = node_child(dir, job->name, &jobdir_ops, NULL, dir->vm);
    if (node && !node->object)
        node->object = job_ref(job);
    return node;
}

static int jobs_lookup(struct node *dir, const char *name, struct node **ret_node) {
    struct job *job = dir->vm->gone ? NULL : job_find(dir->vm->jobs, name);
    struct node *node = NULL;
    if (job)
        node = job_node(dir, job);
    else if (!dir->vm->gone && strcmp(name, jobs_clone.name) == 0)
        node = node_child(dir, name, jobs_clone.ops, &jobs_clone, dir->vm);
    else
        return -ERR_NOT_FOUND;
    if (!node)
        return -ERR_NO_MEMORY;
    *ret_node = node;
    return 0;
}

static int jobs_list(struct node *dir, struct node_list *list) {
    struct job *job;
    if (dir->vm->gone)
        return -ERR_GONE;
    int r = node_list_add(list, jobs_clone.name, S_IFREG, node_inode(dir->vm, JOB_FIRST_NUMBER));
    RB_FOREACH(job, job_index, jobs_index(dir->vm->jobs)) {
        if (r == 0)
            r = node_list_add(list, job->name, S_IFDIR, node_inode(dir->vm, job->number));
    }
    return r;
}

static void jobs_mkdir(struct node *dir, const char *name, mode_t mode, struct request *rq) {
    struct job *job;
    (void)mode;
    int r = dir->vm->gone ? -ERR_GONE : job_make(dir->vm->jobs, name, &job);
    struct node *node = r == 0 ? job_node(dir, job) : NULL;
    if (node)
        request_answer_entry(rq, node);
    else
        request_answer(rq, r < 0 ? r : -ERR_NO_MEMORY);
}

static void jobs_rmdir(struct node *dir, const char *name, struct request *rq) {
    struct job *job = dir->vm->gone ? NULL : job_find(dir->vm->jobs, name);
    if (!job) {
        request_answer(rq,
                       strcmp(name, jobs_clone.name) == 0 ? -ERR_NOT_A_DIRECTORY : -ERR_NOT_FOUND);
        return;
    }
    if (vm_guards(dir->vm, rq->pid, false)) {
        request_answer(rq, -ERR_NOT_PERMITTED);
        return;
    }
    node_forget_child(dir, name);
    job_remove(job);
    request_answer(rq, 0);
}

static void jobs_unlink(struct node *dir, const char *name, struct request *rq) {
    if (strcmp(name, jobs_clone.name) != 0) {
        bool is_job = !dir->vm->gone && job_find(dir->vm->jobs, name);
        request_answer(rq, is_job ? -ERR_IS_A_DIRECTORY : -ERR_NOT_FOUND);
        return;
    }
    node_forget_child(dir, name);
    request_answer(rq, 0);
}

const struct node_ops jobs_ops = {
    .stat = jobs_stat,
    .lookup = jobs_lookup,
    .list = jobs_list,
    .mkdir = jobs_mkdir,
    .rmdir = jobs_rmdir,
    .unlink = jobs_unlink,
    .setattr = node_setattr_ignore,
};

/* ---- .clone ---- */

static void clone_stat(const struct node *node, struct node_stat *ret_stat) {
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, JOB_FIRST_NUMBER);
    ret_stat->st.st_mode = node->row->mode;
}

static void clone_open(struct node *node, int flags, struct request *rq) {
    struct job *job;
    int r = node->vm->gone ? -ERR_GONE : job_make(node->vm->jobs, NULL, &job);
    struct job_handle *h = r == 0 ? calloc(1, sizeof *h) : NULL;
    if (!h) {
        if (r == 0)
            job_remove(job);
        request_answer(rq, r < 0 ? r : -ERR_NO_MEMORY);
        return;
    }
    handle_init(&h->handle, node, flags);
    list_init(&h->polled.link);
    h->job = job_ref(job);
    job->leased = true;
    buf_printf(&h->text, "%s\n", job->name);
    request_answer_opened(rq, &h->handle);
}

static void clone_read(struct handle *handle, size_t length, off_t offset, struct request *rq) {
    struct job_handle *h = (struct job_handle *)handle;
    size_t at = offset < 0 || (size_t)offset > h->text.len ? h->text.len : (size_t)offset;
    size_t left = h->text.len - at;
    request_answer_data(rq, h->text.data + at, left < length ? left : length);
}

static void clone_release(struct handle *handle) {
    struct job_handle *h = (struct job_handle *)handle;
    node_forget_child(handle->node->parent, h->job->name);
    job_remove(h->job);
    job_handle_free(h);
}

const struct node_ops job_clone_ops = {
    .stat = clone_stat,
    .open = clone_open,
    .read = clone_read,
    .release = clone_release,
    .setattr = node_setattr_ignore,
};

/* ---- one job ---- */

static const struct node_row jobdir_rows[] = {
    {"argv", S_IFREG | 0600, &job_text_ops, NULL},
    {"command", S_IFREG | 0600, &job_text_ops, NULL},
    {"cwd", S_IFREG | 0600, &job_value_ops, NULL},
    {"env", S_IFDIR | 0700, &job_env_ops, NULL},
    {"error", S_IFREG | 0400, &job_value_ops, NULL},
    {"exit", S_IFREG | 0400, &job_exit_ops, NULL},
    {"output_max", S_IFREG | 0600, &job_value_ops, NULL},
    {"overflow", S_IFREG | 0600, &job_value_ops, NULL},
    {"shell", S_IFREG | 0600, &job_value_ops, NULL},
    {"signal", S_IFREG | 0200, &job_signal_ops, NULL},
    {"status", S_IFREG | 0400, &job_value_ops, NULL},
    {"stderr", S_IFREG | 0400, &job_stream_ops, NULL},
    {"stdin", S_IFREG | 0200, &job_stdin_ops, NULL},
    {"stdout", S_IFREG | 0400, &job_stream_ops, NULL},
    {"timeout", S_IFREG | 0600, &job_value_ops, NULL},
};
#define JOBDIR_ROWS (sizeof jobdir_rows / sizeof *jobdir_rows)
_Static_assert(JOBDIR_ROWS < JOB_NUMBERS, "inode numbers of one job run into those of the next");

uint64_t jobdir_slot(const struct node_row *row) {
    return (uint64_t)(row - jobdir_rows) + 1;
}

static const struct node_row *jobdir_row(const char *name) {
    for (size_t i = 0; i < JOBDIR_ROWS; i++)
        if (strcmp(jobdir_rows[i].name, name) == 0)
            return &jobdir_rows[i];
    return NULL;
}

static void jobdir_stat(const struct node *node, struct node_stat *ret_stat) {
    const struct job *job = node->object;
    node_stat_init(node, ret_stat);
    ret_stat->st.st_ino = node_inode(node->vm, job->number);
    ret_stat->st.st_mode = S_IFDIR | 0700;
    ret_stat->st.st_nlink = 2;
    ret_stat->st.st_mtim = ret_stat->st.st_ctim = job->created;
    /* Its name is gone when its lease is, and the job of that name may be another at once. */
    ret_stat->entry_seconds = 0;
}

static int jobdir_lookup(struct node *dir, const char *name, struct node **ret_node) {
    struct job *job = dir->object;
    const struct node_row *row = jobdir_row(name);
    struct scratch *scratch = job->removed ? NULL : scratch_find(job->files, name);
    if (job->removed || (!row && !scratch))
        return -ERR_NOT_FOUND;
    /* A WRITE that is held locks its inode: each writer has one to himself. */
    bool own = row && (row->ops == &job_stdin_ops || row->ops == &job_signal_ops);
    struct node *node = own   ? node_child_private(dir, name, row->ops, row, dir->vm)
                        : row ? node_child(dir, name, row->ops, row, dir->vm)
                              : scratch_node(dir, scratch);
    if (!node)
        return -ERR_NO_MEMORY;
    *ret_node = node;
    return 0;
}

static int jobdir_list(struct node *dir, struct node_list *list) {
    struct job *job = dir->object;
    int r = job->removed ? -ERR_NOT_FOUND : 0;
    for (size_t i = 0; i < JOBDIR_ROWS && r == 0; i++)
        r = node_list_add(list, jobdir_rows[i].name, jobdir_rows[i].mode,
                          node_inode(dir->vm, job->number + jobdir_slot(&jobdir_rows[i])));
    return r < 0 ? r : scratch_list(dir, job->files, list);
}

/* Temporary files of tools that put a file in place by rename. */
static void jobdir_create(struct node *dir, const char *name, int flags, mode_t mode,
                          struct request *rq) {
    struct job *job = dir->object;
    if (job->removed)
        request_answer(rq, -ERR_NOT_FOUND);
    else if (jobdir_row(name))
        request_answer(rq, -ERR_EXISTS);
    else if (scratch_is_wanted(dir->vm, name, flags) || scratch_find(job->files, name))
        scratch_create(dir, job->files, name, flags, mode, rq);
    else
        request_answer(rq, -ERR_NOT_PERMITTED);
}

static void jobdir_rename(struct node *dir, const char *name, struct node *new_dir,
                          const char *new_name, unsigned flags, struct request *rq) {
    struct job *job = dir->object;
    const struct node_row *to = jobdir_row(new_name);
    struct scratch *scratch = job->removed ? NULL : scratch_find(job->files, name);
    if (new_dir != dir) {
        request_answer(rq, -ERR_CROSS_DEVICE);
    } else if (!scratch || (to && flags)) {
        request_answer(rq, jobdir_row(name) || scratch ? -ERR_NOT_PERMITTED : -ERR_NOT_FOUND);
    } else if (!to) {
        scratch_rename_node(dir, job->files, scratch, new_name, flags, rq);
    } else {
        const char *data = scratch->content.data ? scratch->content.data : "";
        int r = scratch->directory         ? -ERR_NOT_A_DIRECTORY
                : to->ops == &job_text_ops ? job_text_take(dir, to, data, scratch->content.len)
                                           : job_value_take(dir, to, data, scratch->content.len);
        if (r == 0) {
            node_remove_child(dir, name);
            node_forget_child(dir, new_name);
            scratch_remove(scratch);
        }
        request_answer(rq, r);
    }
}

/* Removing a built-in file succeeds and changes nothing, so that `rm -r jobs/NAME` gets to the
 * rmdir. */
static void jobdir_remove(struct node *dir, const char *name, bool directory, struct request *rq) {
    struct job *job = dir->object;
    const struct node_row *row = jobdir_row(name);
    struct scratch *scratch = job->removed ? NULL : scratch_find(job->files, name);
    if (scratch) {
        scratch_unlink(dir, scratch, directory, rq);
        return;
    }
    if (row && directory != S_ISDIR(row->mode)) {
        request_answer(rq, directory ? -ERR_NOT_A_DIRECTORY : -ERR_IS_A_DIRECTORY);
        return;
    }
    node_forget_child(dir, name);
    request_answer(rq, row ? 0 : -ERR_NOT_FOUND);
}

static void jobdir_unlink(struct node *dir, const char *name, struct request *rq) {
    jobdir_remove(dir, name, false, rq);
}

static void jobdir_rmdir(struct node *dir, const char *name, struct request *rq) {
    jobdir_remove(dir, name, true, rq);
}

const struct node_ops jobdir_ops = {
    .stat = jobdir_stat,
    .lookup = jobdir_lookup,
    .list = jobdir_list,
    .create = jobdir_create,
    .rename = jobdir_rename,
    .unlink = jobdir_unlink,
    .rmdir = jobdir_rmdir,
    .setattr = node_setattr_ignore,
    .free = job_free_node,
};
