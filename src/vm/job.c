#include "vm/job.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest/env_file.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vm/vars.h"

/* The jobs of a VM. What runs in the guest is a struct command; here is what comes before it, after
 * it, and around it. */

struct jobs {
    struct vm *vm; /* the owner */
    struct job_index index;
    struct list finished; /* of job, in the order in which they ended */
    unsigned count, finished_count;
    uint64_t last_number;
    struct timespec changed;
};

static int job_compare(struct job *a, struct job *b) {
    return strcmp(a->name, b->name);
}
RB_GENERATE(job_index, job, by_name, job_compare)

struct jobs *jobs_new(struct vm *vm) {
    struct jobs *jobs = calloc(1, sizeof *jobs);
    if (!jobs)
        return NULL;
    jobs->vm = vm;
    jobs->changed = vm->created;
    RB_INIT(&jobs->index);
    list_init(&jobs->finished);
    return jobs;
}

void jobs_free(struct jobs *jobs) {
    struct job *job;
    if (!jobs)
        return;
    while ((job = RB_MIN(job_index, &jobs->index)))
        job_remove(job);
    free(jobs);
}

struct job_index *jobs_index(struct jobs *jobs) {
    return &jobs->index;
}

const struct timespec *jobs_changed(const struct jobs *jobs) {
    return &jobs->changed;
}

struct job *job_find(struct jobs *jobs, const char *name) {
    struct job key = {.name = (char *)(uintptr_t)name};
    return RB_FIND(job_index, &jobs->index, &key);
}

struct job *job_ref(struct job *job) {
    job->refs++;
    return job;
}

void job_unref(struct job *job) {
    if (--job->refs > 0)
        return;
    vm_wait_cancel(&job->progress);
    vm_wait_cancel(&job->room);
    if (job->command)
        command_unref(job->command);
    if (job->text.data)
        explicit_bzero(job->text.data, job->text.len);
    buf_free(&job->text);
    buf_free(&job->input);
    buf_free(&job->error);
    free(job->folder);
    free(job->name);
    vm_unref(job->vm);
    free(job);
}

/* [A-Za-z0-9_][A-Za-z0-9_.-]*: no name of ours starts with a dot, and none looks like an option. */
static bool job_name_is_valid(const char *name) {
    static const char letters[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-";
    size_t length = strspn(name, letters);
    return length > 0 && length <= JOB_NAME_LIMIT && !name[length] && name[0] != '.' &&
           name[0] != '-';
}

static void jobs_change(struct jobs *jobs) {
    clock_gettime(CLOCK_REALTIME, &jobs->changed);
}

static void job_stop_timer(struct job *job) {
    if (!job->timer)
        return;
    uv_timer_stop(job->timer);
    uv_close((uv_handle_t *)job->timer, (uv_close_cb)free);
    job->timer = NULL;
}

static void job_on_progress(struct vm_wait *wait, int status);
static void job_on_room(struct vm_wait *wait, int status);

void job_set_serial(struct job *job, uint64_t serial) {
    struct jobs *jobs = job->vm->jobs;
    uint64_t range = (JOB_FIRST_NUMBER / 3) / JOB_NUMBERS;
    job->serial = serial;
    job->number = JOB_FIRST_NUMBER + serial % range * JOB_NUMBERS;
    if (serial > jobs->last_number)
        jobs->last_number = serial;
}

/* Of its variables: once it has been started they count for nothing, and what no program can be
 * started with would be found out too late. */
static int job_guard_env(void *arg, const char *name, size_t length, bool newline) {
    struct job *job = arg;
    int r = 0;
    if (job->command)
        r = vm_fail(job->vm, -ERR_BUSY, "jobs/%s/env/%s: this job has been started already",
                    job->name, name);
    else if (env_name_is_valid(name, strlen(name)) && !var_fits(name, length, newline))
        r = vm_fail(job->vm, -ERR_TOO_LARGE,
                    "jobs/%s/env/%s: a value takes %zu bytes at most, so that a program can be "
                    "started with it",
                    job->name, name, var_value_limit(name));
    if (r < 0)
        job_keep_error(job);
    return r;
}

int job_make(struct jobs *jobs, const char *name, struct job **ret_job) {
    struct vm *vm = jobs->vm;
    char number[24];
    uint64_t next = jobs->last_number + 1;
    if (name && !job_name_is_valid(name))
        return vm_fail(vm, -ERR_INVALID,
                       "jobs/%s: no name for a job: it takes up to %d letters, digits and _.-, and "
                       "starts with a letter, a digit or _",
                       name, JOB_NAME_LIMIT);
    for (; !name; next++) {
        snprintf(number, sizeof number, "%llu", (unsigned long long)next);
        if (!job_find(jobs, number))
            name = number;
    }
    if (job_find(jobs, name))
        return -ERR_EXISTS;
    if (jobs->count >= JOBS_LIMIT)
        return vm_fail(vm, -ERR_NO_ROOM, "jobs/%s: there are %d jobs already; remove some", name,
                       JOBS_LIMIT);
    struct job *job = calloc(1, sizeof *job);
    if (!job)
        return -ERR_NO_MEMORY;
    job->refs = 1;
    job->vm = vm_ref(vm);
    job->name = strdup(name);
    job->env = scratches_new(vm);
    job->files = scratches_new(vm);
    if (!job->name || !job->env || !job->files) {
        scratches_free(job->env);
        scratches_free(job->files);
        job_unref(job);
        return -ERR_NO_MEMORY;
    }
    scratches_keep(job->env);
    scratches_guard(job->env, job_guard_env, job);
    list_init(&job->finished);
    list_init(&job->waits);
    list_init(&job->input_waits);
    list_init(&job->progress.link);
    list_init(&job->room.link);
    job->progress.done = job_on_progress;
    job->room.done = job_on_room;
    job->output_max = vm->daemon->settings.output_max;
    clock_gettime(CLOCK_REALTIME, &job->created);
    job->changed = job->created;
    RB_INSERT(job_index, &jobs->index, job);
    jobs->count++;
    jobs_change(jobs);
    job_set_serial(job, jobs->last_number + 1);
    *ret_job = job;
    return 0;
}

void job_remove(struct job *job) {
    struct jobs *jobs = job->vm->jobs;
    if (job->removed)
        return;
    job->removed = true;
    RB_REMOVE(job_index, &jobs->index, job);
    jobs->count--;
    if (!list_is_empty(&job->finished)) {
        list_remove(&job->finished);
        jobs->finished_count--;
    }
    jobs_change(jobs);
    job_stop_timer(job);
    scratches_free(job->env);
    scratches_free(job->files);
    job->env = job->files = NULL;
    job_record_remove(job);
    if (job->command)
        command_kill(job->command, COMMAND_KILL_S);
    /* A job that will never be started has no readers to be kept waiting. */
    vm_wait_wake(&job->waits, 0);
    vm_wait_wake(&job->input_waits, 0);
    job_unref(job);
}

const char *job_state_name(const struct job *job) {
    return !job->command ? "new" : job_has_ended(job) ? "exited" : "running";
}

bool job_has_ended(const struct job *job) {
    return job->command && job->command->end != COMMAND_RUNNING && !job->recording;
}

/* Beyond the limit, the one that ended first goes. */
static void jobs_bound(struct jobs *jobs) {
    while (jobs->finished_count > JOBS_FINISHED_LIMIT) {
        struct job *oldest = LIST_OWNER(jobs->finished.next, struct job, finished);
        log_info("%s: the finished job %s is removed, there are more than %d", jobs->vm->id,
                 oldest->name, JOBS_FINISHED_LIMIT);
        job_remove(oldest);
    }
}

static void job_finish(struct job *job) {
    struct jobs *jobs = job->vm->jobs;
    list_append(&jobs->finished, &job->finished);
    jobs->finished_count++;
    jobs_bound(jobs);
}

static void job_ended(struct job *job) {
    clock_gettime(CLOCK_REALTIME, &job->changed);
    job_stop_timer(job);
    if (job->overdue)
        vm_fail(job->vm, -ERR_TIMED_OUT, "jobs/%s: it was ended after its timeout of %.3g s",
                job->name, job->timeout / 1000.0);
    if (job->overdue || job->command->end == COMMAND_LOST || job->command->end == COMMAND_REFUSED)
        job_keep_error(job); /* the command has left its words just now */
    if (job->removed || job->leased)
        return;
    job_record_end(job);
    job_finish(job);
}

void job_finish_restored(struct job *job, struct command *command) {
    job->command = command;
    job_finish(job);
}

static void job_on_progress(struct vm_wait *wait, int status) {
    struct job *job = LIST_OWNER(wait, struct job, progress);
    (void)status;
    job_ref(job);
    if (job->command->end == COMMAND_RUNNING)
        list_append(&job->command->waits, &job->progress.link);
    else
        job_ended(job);
    vm_wait_wake(&job->waits, 0);
    job_unref(job);
}

static void job_on_room(struct vm_wait *wait, int status) {
    struct job *job = LIST_OWNER(wait, struct job, room);
    job_ref(job);
    if (job->command->end == COMMAND_RUNNING)
        list_append(&job->command->input_waits, &job->room.link);
    vm_wait_wake(&job->input_waits, status);
    job_unref(job);
}

static void job_is_overdue(uv_timer_t *timer) {
    struct job *job = timer->data;
    job->overdue = true;
    command_kill(job->command, JOB_KILL_S);
}

static void job_watch(struct job *job) {
    if (!job->command || job_has_ended(job) || job->overdue || job->removed)
        return;
    if (!job->timeout) {
        job_stop_timer(job);
        return;
    }
    if (!job->timer) {
        job->timer = malloc(sizeof *job->timer);
        if (!job->timer)
            return;
        uv_timer_init(job->vm->daemon->loop, job->timer);
        job->timer->data = job;
    }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int64_t gone = (int64_t)(now.tv_sec - job->changed.tv_sec) * 1000 +
                   (now.tv_nsec - job->changed.tv_nsec) / 1000000;
    int64_t left = (int64_t)job->timeout - (gone > 0 ? gone : 0);
    uv_timer_start(job->timer, job_is_overdue, left > 0 ? (uint64_t)left : 0, 0);
}

void job_set_timeout(struct job *job, unsigned timeout_ms) {
    job->timeout = timeout_ms;
    job_watch(job);
}

/* The job's own variables, as they are now. */
static int job_exports(const struct job *job, struct buf *out) {
    struct scratch *file;
    RB_FOREACH(file, scratch_index, scratches_index(job->env)) {
        size_t length = file->content.len;
        if (file->directory || !env_name_is_valid(file->name, strlen(file->name)))
            continue;
        if (length && file->content.data[length - 1] == '\n')
            length--;
        if (length && memchr(file->content.data, 0, length))
            return vm_fail(job->vm, -ERR_INVALID, "jobs/%s/env/%s: a value holds no NUL byte",
                           job->name, file->name);
        job->vm->guest->command_export(out, file->name,
                                       file->content.data ? file->content.data : "", length);
    }
    return out->failed ? -ERR_NO_MEMORY : 0;
}

static void job_flush_input(struct job *job) {
    if (job->input.len)
        command_input(job->command, job->input.data, job->input.len);
    buf_free(&job->input);
    if (job->input_over)
        command_input_end(job->command);
    vm_wait_wake(&job->input_waits, 0);
}

int job_check(struct job *job) {
    cleanup_buf struct buf exports = {0};
    int r = job_exports(job, &exports);
    if (exports.data)
        explicit_bzero(exports.data, exports.len);
    return r;
}

void job_refuse(struct job *job, int status) {
    struct command *command = command_restore(job->vm, job->name);
    if (!command)
        return;
    command->end = COMMAND_REFUSED;
    command->error = status;
    job->command = command;
    if (!job->leased)
        job_finish(job);
    vm_wait_wake(&job->waits, 0);
    vm_wait_wake(&job->input_waits, -ERR_NO_READER);
}

int job_start(struct job *job) {
    struct vm *vm = job->vm;
    cleanup_buf struct buf exports = {0}, name = {0};
    int r = job_exports(job, &exports);
    buf_printf(&name, "jobs/%s", job->name);
    if (r < 0 || name.failed)
        return r < 0 ? r : -ERR_NO_MEMORY;
    const struct command_spec spec = {
        .name = name.data,
        .guest = {.login = job->shell == JOB_SHELL_OF_VM ? vm_uses_login_shell(vm)
                                                         : job->shell == JOB_SHELL_LOGIN,
                  .words = job->words,
                  .input = true,
                  .folder = job->folder,
                  .text = job->text.data ? job->text.data : "",
                  .length = job->text.len,
                  .exports = &exports},
        .apart = true,
        .signalled = true,
        .flowing = job->flowing,
        .output_max = job->output_max,
    };
    r = command_run(vm, &spec, &job->command);
    if (exports.data)
        explicit_bzero(exports.data, exports.len);
    if (r < 0)
        return r;
    clock_gettime(CLOCK_REALTIME, &job->changed);
    list_append(&job->command->waits, &job->progress.link);
    list_append(&job->command->input_waits, &job->room.link);
    if (!job->leased)
        job_record_begin(job);
    job_watch(job);
    job_flush_input(job);
    vm_wait_wake(&job->waits, 0);
    return 0;
}

void job_keep_error(struct job *job) {
    buf_free(&job->error);
    buf_append(&job->error, job->vm->error.data ? job->vm->error.data : "", job->vm->error.len);
}

void job_print_exit(const struct job *job, struct buf *out) {
    const struct command *command = job->command;
    if (!command || command->end == COMMAND_LOST || command->end == COMMAND_REFUSED)
        buf_append_str(out, "lost");
    else if (command->end == COMMAND_SIGNALED)
        buf_append_str(out, command->signal);
    else if (job->overdue) /* however it took it */
        buf_append_str(out, "TERM");
    else
        buf_printf(out, "%d", command->status);
    buf_append_char(out, '\n');
}

bool job_write_input(struct job *job, const char *data, size_t length, int *ret_status) {
    *ret_status = 0;
    if (job->input_over || job->removed || job_has_ended(job)) {
        *ret_status = -ERR_NO_READER;
        return false;
    }
    if (job->command) {
        ssize_t waiting = command_input(job->command, data, length);
        if (waiting < 0)
            *ret_status = (int)waiting;
        return waiting >= COMMAND_INPUT_HIGH;
    }
    buf_append(&job->input, data, length);
    if (job->input.failed)
        *ret_status = -ERR_NO_MEMORY;
    return job->input.len > JOB_INPUT_EARLY;
}

void job_open_input(struct job *job) {
    job->input_writers++;
}

void job_close_input(struct job *job) {
    if (--job->input_writers > 0)
        return;
    job->input_over = true;
    if (job->command)
        command_input_end(job->command);
}
