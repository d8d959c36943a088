#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/log.h"
#include "vm/job.h"

/* What the next daemon needs of a job: a folder for each that was started, jobs/SERIAL in the VM's,
 * with job.json and, once it has ended, its output. A job of which only the start is recorded was
 * lost with the daemon that ran it. Jobs of `.clone` end with who holds them, and are not recorded.
 */

#define JOB_RECORD_VERSION 1
#define JOB_RECORD_LIMIT (1 << 20)

struct stream_writing {
    const char *name;
    struct buf memory;  /* a copy; or */
    int fd;             /* of the spool's file, a duplicate; -1: none */
    struct spool spool; /* its numbers */
};

struct job_writing {
    uv_work_t work;
    struct job *job; /* a reference */
    char *dir, *text;
    struct stream_writing streams[2];
    int status;
};

static char *job_record_dir(const struct job *job) {
    char *dir;
    return asprintf(&dir, "%s/jobs/%llu", job->vm->dir, (unsigned long long)job->serial) < 0 ? NULL
                                                                                             : dir;
}

static json_t *spool_describe(const struct spool *spool) {
    return json_pack("{s:I, s:I, s:b}", "start", (json_int_t)spool->start, "end",
                     (json_int_t)spool->end, "cut", spool->cut);
}

static const char *const job_ends[] = {
    [COMMAND_RUNNING] = "running", [COMMAND_EXITED] = "exited",   [COMMAND_SIGNALED] = "signaled",
    [COMMAND_LOST] = "lost",       [COMMAND_REFUSED] = "refused",
};
#define JOB_ENDS (sizeof job_ends / sizeof *job_ends)

static char *job_record_text(const struct job *job) {
    const struct command *command = job->command;
    json_t *source = json_stringn(job->words || !job->text.data ? "" : job->text.data,
                                  job->words ? 0 : job->text.len);
    json_t *record =
        json_pack("{s:i, s:s, s:I, s:I, s:s, s:i, s:s, s:b, s:o, s:b, s:o, s:o}", "version",
                  JOB_RECORD_VERSION, "name", job->name, "created", (json_int_t)job->created.tv_sec,
                  "changed", (json_int_t)job->changed.tv_sec, "end", job_ends[command->end],
                  "status", command->status, "signal", command->signal, "overdue", job->overdue,
                  "text", source ? source : json_string(""), /* it is no UTF-8 */
                  "words", job->words, "stdout", spool_describe(&command->out), "stderr",
                  spool_describe(&command->err));
    char *text = record ? json_dumps(record, JSON_INDENT(2)) : NULL;
    json_decref(record);
    return text;
}

/* At once, so that a job whose start was answered is known, whatever becomes of the daemon. */
void job_record_begin(struct job *job) {
    cleanup_free char *dir = job_record_dir(job), *path = NULL;
    cleanup_free char *text = job_record_text(job);
    if (!dir || !text || asprintf(&path, "%s/job.json", dir) < 0)
        return;
    int r = fs_mkdir_all(dir, 0700);
    if (r == 0)
        r = fs_replace_fast(path, 0600, text, strlen(text));
    if (r < 0)
        log_error("cannot write %s: %s", path, strerror(-r));
    job->recorded = true;
}

static int stream_write(const char *dir, const struct stream_writing *stream) {
    cleanup_free char *path = NULL, *own = NULL;
    if (asprintf(&path, "%s/%s", dir, stream->name) < 0 ||
        asprintf(&own, "/proc/self/fd/%d", stream->fd) < 0)
        return -ENOMEM;
    if (stream->fd < 0)
        return fs_replace_fast(path, 0600, stream->memory.data ? stream->memory.data : "",
                               stream->memory.len);
    if (!stream->spool.flowing && linkat(AT_FDCWD, own, AT_FDCWD, path, AT_SYMLINK_FOLLOW) == 0)
        return 0;
    cleanup_close int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    char block[65536];
    for (uint64_t at = stream->spool.start; at < stream->spool.end;) {
        ssize_t n = spool_read(&stream->spool, at, block, sizeof block);
        if (n <= 0)
            return n < 0 ? (int)n : -EIO;
        if (write(fd, block, (size_t)n) != n)
            return -ENOSPC;
        at += (uint64_t)n;
    }
    return 0;
}

/* Its output first: a record that names an end has it. */
static void job_record_write(uv_work_t *work) {
    struct job_writing *w = work->data;
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/job.json", w->dir) < 0) {
        w->status = -ENOMEM;
        return;
    }
    for (size_t i = 0; i < 2 && w->status == 0; i++)
        w->status = stream_write(w->dir, &w->streams[i]);
    if (w->status == 0)
        w->status = fs_replace_fast(path, 0600, w->text, strlen(w->text));
}

static void job_writing_free(struct job_writing *w) {
    for (size_t i = 0; i < 2; i++) {
        buf_free(&w->streams[i].memory);
        if (w->streams[i].fd >= 0)
            close(w->streams[i].fd);
    }
    free(w->text);
    free(w->dir);
    free(w);
}

static void job_record_remove_files(uv_work_t *work) {
    struct job_writing *w = work->data;
    fs_remove_all(w->dir);
}

static void job_record_removed(uv_work_t *work, int status) {
    struct job_writing *w = work->data;
    (void)status;
    job_unref(w->job);
    job_writing_free(w);
}

static struct job_writing *job_writing_new(struct job *job) {
    struct job_writing *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->streams[0].fd = w->streams[1].fd = -1;
    w->work.data = w;
    w->job = job;
    w->dir = job_record_dir(job);
    if (w->dir)
        return w;
    job_writing_free(w);
    return NULL;
}

void job_record_remove(struct job *job) {
    if (!job->recorded || job->recording || job->vm->gone)
        return; /* in job_record_written(), or with the VM's folder */
    struct job_writing *w = job_writing_new(job);
    cleanup_buf struct buf path = {0};
    job->recorded = false;
    buf_printf(&path, "%s/job.json", w ? w->dir : "");
    if (w && !path.failed)
        unlink(path.data); /* at once, so that it does not come back */
    if (w && uv_queue_work(job->vm->daemon->loop, &w->work, job_record_remove_files,
                           job_record_removed) == 0)
        job_ref(job);
    else if (w)
        job_writing_free(w);
}

static void job_record_written(uv_work_t *work, int status) {
    struct job_writing *w = work->data;
    struct job *job = w->job;
    (void)status;
    job->recording = false;
    if (w->status < 0)
        log_error("cannot record the job %s of %s: %s", job->name, job->vm->id,
                  strerror(-w->status));
    if (job->removed)
        job_record_remove(job);
    vm_wait_wake(&job->waits, 0);
    job_unref(job);
    job_writing_free(w);
}

static bool stream_prepare(struct stream_writing *stream, const char *name,
                           const struct spool *spool) {
    stream->name = name;
    stream->spool = *spool;
    if (spool->fd < 0) {
        buf_append(&stream->memory, spool->memory.data ? spool->memory.data : "",
                   spool->memory.len);
        return !stream->memory.failed;
    }
    stream->fd = stream->spool.fd = fcntl(spool->fd, F_DUPFD_CLOEXEC, 0);
    return stream->fd >= 0;
}

void job_record_end(struct job *job) {
    struct job_writing *w = job->recorded && !job->recording ? job_writing_new(job) : NULL;
    if (!w)
        return;
    w->text = job_record_text(job);
    if (w->text && stream_prepare(&w->streams[0], "stdout", &job->command->out) &&
        stream_prepare(&w->streams[1], "stderr", &job->command->err) &&
        uv_queue_work(job->vm->daemon->loop, &w->work, job_record_write, job_record_written) == 0) {
        job->recording = true;
        job_ref(job);
        return;
    }
    log_error("no memory to record the job %s of %s", job->name, job->vm->id);
    job_writing_free(w);
}

/* ---- bringing back ---- */

static void spool_restore(struct spool *spool, const json_t *saved, const char *dir,
                          const char *name) {
    cleanup_free char *path = NULL;
    struct stat st;
    json_int_t start = json_integer_value(json_object_get(saved, "start"));
    json_int_t end = json_integer_value(json_object_get(saved, "end"));
    if (asprintf(&path, "%s/%s", dir, name) < 0)
        return;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return;
    spool->start = spool->base = spool->end = (uint64_t)(start < 0 ? 0 : start);
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || start < 0 || end < start ||
        st.st_size < end - start) {
        close(fd);
        spool->cut = true; /* it is not what was recorded: no reader is to take it for whole */
        return;
    }
    spool->cut = json_is_true(json_object_get(saved, "cut"));
    spool->end = (uint64_t)end;
    spool->fd = fd;
    if (end - start > SPOOL_MEMORY)
        return;
    char block[SPOOL_MEMORY];
    ssize_t n = spool_read(spool, spool->start, block, sizeof block);
    if (n == (ssize_t)(end - start)) { /* no descriptor for small ones */
        buf_append(&spool->memory, block, (size_t)n);
        close(fd);
        spool->fd = -1;
    }
}

static void job_restore(struct jobs *jobs, struct vm *vm, const char *dir, uint64_t serial) {
    cleanup_free char *path = NULL;
    cleanup_buf struct buf text = {0};
    struct job *job;
    if (asprintf(&path, "%s/job.json", dir) < 0)
        return;
    int r = fs_read(path, JOB_RECORD_LIMIT, &text);
    if (r == -ENOENT) /* it was being removed */
        fs_remove_all(dir);
    if (r < 0)
        return;
    fs_remove_leftovers(path);
    json_t *record = json_loadb(text.data ? text.data : "", text.len, 0, NULL);
    const char *end = json_string_value(json_object_get(record, "end"));
    const char *name = json_string_value(json_object_get(record, "name"));
    const char *signal = json_string_value(json_object_get(record, "signal"));
    const json_t *source = json_object_get(record, "text");
    if (!end || !name || job_make(jobs, name, &job) < 0) {
        log_error("%s is no record of a job", path);
        json_decref(record);
        return;
    }
    struct command *command = command_restore(vm, name);
    if (!command) {
        job_remove(job);
        json_decref(record);
        return;
    }
    command->end = COMMAND_LOST; /* with the daemon that ran it */
    command->error = -ERR_COMMAND_LOST;
    for (size_t i = COMMAND_EXITED; i < JOB_ENDS; i++)
        if (strcmp(end, job_ends[i]) == 0)
            command->end = (enum command_end)i;
    command->status = (int)json_integer_value(json_object_get(record, "status"));
    snprintf(command->signal, sizeof command->signal, "%s", signal ? signal : "");
    if (strcmp(end, job_ends[COMMAND_RUNNING]) != 0) {
        spool_restore(&command->out, json_object_get(record, "stdout"), dir, "stdout");
        spool_restore(&command->err, json_object_get(record, "stderr"), dir, "stderr");
    }
    job_set_serial(job, serial);
    job->overdue = json_is_true(json_object_get(record, "overdue"));
    job->words = json_is_true(json_object_get(record, "words"));
    buf_append(&job->text, json_string_value(source) ? json_string_value(source) : "",
               json_string_length(source));
    job->created.tv_sec = json_integer_value(json_object_get(record, "created"));
    job->changed.tv_sec = json_integer_value(json_object_get(record, "changed"));
    job->recorded = true;
    job_finish_restored(job, command);
    json_decref(record);
}

void jobs_load(struct jobs *jobs, struct vm *vm) {
    cleanup_free char *path = NULL;
    if (asprintf(&path, "%s/jobs", vm->dir) < 0)
        return;
    DIR *dir = opendir(path);
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        cleanup_free char *one = NULL;
        char *rest;
        uint64_t serial = strtoull(entry->d_name, &rest, 10);
        if (serial && !*rest && asprintf(&one, "%s/%s", path, entry->d_name) >= 0)
            job_restore(jobs, vm, one, serial);
    }
    closedir(dir);
}
