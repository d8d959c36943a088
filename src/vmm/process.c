#include "vmm/process.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"

#define PROCESS_BOOT_ID_SIZE 64

struct process {
    uv_poll_t poll; /* of the pidfd */
    pid_t pid;
    int pidfd; /* owned */
    uint64_t start_time;
    process_exited *exited;
    void *arg;
};

/* Reads at most size - 1 bytes and ends them with a NUL. Returns the length or -errno. */
static ssize_t file_read_start(const char *path, char *data, size_t size) {
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t length = read(fd, data, size - 1);
    if (length < 0)
        return -errno;
    data[length] = '\0';
    return length;
}

/* Field 22 of /proc/PID/stat. -ESRCH for a process that is gone or a zombie. */
static int process_read_start_time(pid_t pid, uint64_t *ret_time) {
    char path[64], stat[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    ssize_t length = file_read_start(path, stat, sizeof stat);
    if (length < 0)
        return length == -ENOENT ? -ESRCH : (int)length;
    /* Field 2 is the name in parentheses and may hold anything, more of them included. */
    const char *field = strrchr(stat, ')');
    if (!field || (field[1] && strchr("ZXx", field[2])))
        return -ESRCH;
    for (int i = 2; i < 22; i++) {
        field = strchr(field + 1, ' ');
        if (!field)
            return -EIO;
    }
    char *end;
    errno = 0;
    uint64_t time = strtoull(field + 1, &end, 10);
    if (errno || end == field + 1)
        return -EIO;
    *ret_time = time;
    return 0;
}

/* Start times count from the boot: after another one, pid and time may both fit a stranger. */
/* The same for as long as we live. */
static int boot_id_read(char *data) {
    static char boot_id[PROCESS_BOOT_ID_SIZE];
    if (!boot_id[0]) {
        ssize_t length =
            file_read_start("/proc/sys/kernel/random/boot_id", boot_id, PROCESS_BOOT_ID_SIZE);
        if (length < 0)
            return (int)length;
        boot_id[strcspn(boot_id, "\n")] = '\0';
    }
    memcpy(data, boot_id, PROCESS_BOOT_ID_SIZE);
    return 0;
}

static struct process_end process_find_end(int pidfd) {
    struct process_end end = {.status = -1, .how = "exit status unknown"};
    siginfo_t info = {0};
    if (waitid(P_PIDFD, (id_t)pidfd, &info, WEXITED | WNOHANG) < 0 || info.si_pid == 0)
        return end; /* ECHILD: an earlier daemon's child */
    if (info.si_code == CLD_EXITED) {
        end.status = info.si_status;
        snprintf(end.how, sizeof end.how, "exit status %d", end.status);
        return end;
    }
    end.signal = info.si_status;
    const char *name = sigabbrev_np(end.signal);
    if (name)
        snprintf(end.how, sizeof end.how, "killed by SIG%s", name);
    else
        snprintf(end.how, sizeof end.how, "killed by signal %d", end.signal);
    return end;
}

bool process_was_killed(const struct process_end *end) {
    static const int signals[] = {SIGKILL, SIGTERM, SIGINT, SIGHUP, SIGQUIT};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        if (end->signal == signals[i])
            return true;
    return false;
}

static void process_on_poll(uv_poll_t *poll, int status, int events) {
    struct process *p = poll->data;
    (void)status, (void)events;
    uv_poll_stop(poll);
    struct process_end end = process_find_end(p->pidfd);
    p->exited(p->arg, &end);
}

void process_each(const char *text, process_visit *visit, void *arg) {
    DIR *proc = opendir("/proc");
    struct stat st;
    if (!proc)
        return;
    for (struct dirent *entry; (entry = readdir(proc));) {
        char path[sizeof entry->d_name + 32], line[16384];
        pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (pid <= 1 || pid == getpid() || fstatat(dirfd(proc), entry->d_name, &st, 0) < 0)
            continue;
        snprintf(path, sizeof path, "/proc/%s/cmdline", entry->d_name);
        ssize_t length = file_read_start(path, line, sizeof line);
        if (length > 0 && memmem(line, (size_t)length, text, strlen(text)))
            visit(arg, pid, st.st_uid, line, (size_t)length);
    }
    closedir(proc);
}

struct process_strays {
    const char *text;
    unsigned count;
};

/* A word of the command line, or a part of one between commas: other paths may end like this one.
 */
static bool process_line_has_word(const char *line, size_t length, const char *word) {
    size_t size = strlen(word);
    const char *end = line + length;
    for (const char *at = line; (at = memmem(at, (size_t)(end - at), word, size)); at++)
        if ((at == line || at[-1] == '\0' || at[-1] == ',') &&
            (at + size == end || at[size] == '\0' || at[size] == ','))
            return true;
    return false;
}

static void process_kill_stray(void *arg, pid_t pid, uid_t owner, const char *line, size_t length) {
    struct process_strays *strays = arg;
    const char *text = strays->text;
    char path[64], again[16384];
    (void)line, (void)length;
    if (owner != geteuid() && geteuid() != 0) /* root has some run as others */
        return;
    /* The number may be another's by now: it is looked at again with a hold on it. */
    cleanup_close int pidfd = pidfd_open(pid, 0);
    snprintf(path, sizeof path, "/proc/%d/cmdline", (int)pid);
    ssize_t n = pidfd < 0 ? -1 : file_read_start(path, again, sizeof again);
    if (n <= 0 || !process_line_has_word(again, (size_t)n, text))
        return;
    log_warn("process %d was left behind by an earlier daemon: it is ended", (int)pid);
    pidfd_send_signal(pidfd, SIGKILL, NULL, 0);
    strays->count++;
}

unsigned process_kill_strays(const char *text) {
    struct process_strays strays = {.text = text};
    process_each(text, process_kill_stray, &strays);
    return strays.count;
}

static void process_on_closed(uv_handle_t *handle) {
    free(handle->data);
}

/* Takes over `pidfd` on success. */
static int process_watch(uv_loop_t *loop, pid_t pid, int pidfd, uint64_t start_time,
                         process_exited *exited, void *arg, struct process **ret_process) {
    struct process *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    *p = (struct process){
        .pid = pid, .pidfd = pidfd, .start_time = start_time, .exited = exited, .arg = arg};
    int status = uv_poll_init(loop, &p->poll, pidfd);
    if (status < 0) {
        free(p);
        return status;
    }
    p->poll.data = p;
    status = uv_poll_start(&p->poll, UV_READABLE, process_on_poll);
    if (status < 0) {
        uv_close((uv_handle_t *)&p->poll, process_on_closed);
        return status;
    }
    *ret_process = p;
    return 0;
}

/* `copies` are descriptors above all those that the child gets, so that none is in another's way.
 */
static int process_hand_down(posix_spawn_file_actions_t *actions, const int *copies) {
    int count = 0;
    for (; count < PROCESS_FDS && copies[count] >= 0; count++) {
        int error = posix_spawn_file_actions_adddup2(actions, copies[count], PROCESS_FD + count);
        if (error)
            return error;
    }
    return posix_spawn_file_actions_addclosefrom_np(actions, PROCESS_FD + count);
}

/* util-linux: it is part of every Debian. The program takes its place. */
static const char *process_binder(void) {
    static const char *const places[] = {"/usr/bin/setpriv", "/bin/setpriv"};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        if (access(places[i], X_OK) == 0)
            return places[i];
    return NULL;
}

/* The same argv behind the words of the binder; the caller frees the array. */
static char **process_bind(const struct process_options *o, const char *binder) {
    const char *words[] = {binder, "--pdeathsig", "KILL", "--", o->program};
    size_t before = sizeof words / sizeof *words, count = 0;
    while (o->argv[count])
        count++;
    char **argv = calloc(before + count, sizeof *argv); /* without its argv[0], with the NULL */
    if (!argv)
        return NULL;
    memcpy(argv, words, sizeof words);
    memcpy(argv + before, o->argv + 1, count * sizeof *argv);
    return argv;
}

/* posix_spawn and not uv_spawn: it closes every other descriptor, those too that this daemon was
 * started with, and the end is told by the pidfd for children and adopted processes alike. */
static int process_start_with(const struct process_options *o, const int *copies, int output,
                              int log, pid_t *ret_pid) {
    const char *binder = o->transient ? process_binder() : NULL;
    cleanup_free char **bound = binder ? process_bind(o, binder) : NULL;
    if (o->transient && !bound)
        return binder ? -ENOMEM : -ENOENT;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    int error = posix_spawn_file_actions_init(&actions);
    if (error)
        return -error;
    error = posix_spawnattr_init(&attributes);
    if (error) {
        posix_spawn_file_actions_destroy(&actions);
        return -error;
    }
    if ((error = posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK |
                                                           POSIX_SPAWN_SETSIGDEF)) ||
        (error = posix_spawnattr_setsigmask(&attributes, &none)) ||
        (error = posix_spawnattr_setsigdefault(&attributes, &all)) ||
        (error = posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)) ||
        (error = posix_spawn_file_actions_adddup2(&actions, output, 1)) ||
        (error = posix_spawn_file_actions_adddup2(&actions, log, 2)) ||
        (error = process_hand_down(&actions, copies)) ||
        (error = posix_spawn_file_actions_addchdir_np(&actions, "/")) ||
        (error = posix_spawn(ret_pid, bound ? binder : o->program, &actions, &attributes,
                             bound ? bound : o->argv, o->env)))
        log_debug("%s cannot be started: %s", o->program, strerror(error));
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return -error;
}

static int process_start(const struct process_options *o, int output, int log, pid_t *ret_pid) {
    int copies[PROCESS_FDS], status = 0;
    for (int i = 0; i < PROCESS_FDS; i++) {
        copies[i] =
            o->fds[i] < 0 ? -1 : fcntl(o->fds[i], F_DUPFD_CLOEXEC, PROCESS_FD + PROCESS_FDS);
        if (o->fds[i] >= 0 && copies[i] < 0)
            status = -errno;
    }
    if (status == 0)
        status = process_start_with(o, copies, output, log, ret_pid);
    for (int i = 0; i < PROCESS_FDS; i++)
        if (copies[i] >= 0)
            close(copies[i]);
    return status;
}

/* O_APPEND: whoever truncates a log that has grown too long gets no hole of NULs before it. */
static int log_open(const char *path) {
    return open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
}

int process_spawn(uv_loop_t *loop, const struct process_options *options, process_exited *exited,
                  void *arg, struct process **ret_process) {
    cleanup_close int log = log_open(options->log);
    cleanup_close int output = options->output ? log_open(options->output) : -1;
    if (log < 0 || (options->output && output < 0))
        return -errno;
    pid_t pid;
    int status = process_start(options, output < 0 ? log : output, log, &pid);
    if (status < 0)
        return status;
    /* Nobody else waits for the child, so its number stays its own. Threads inherit the policy. */
    if (options->idle && sched_setscheduler(pid, SCHED_IDLE, &(struct sched_param){0}) < 0)
        log_debug("process %d has no idle priority: %s", (int)pid, strerror(errno));
    int pidfd = pidfd_open(pid, 0);
    status = pidfd < 0 ? -errno : 0;
    uint64_t start_time = 0;
    if (status == 0)
        status = process_read_start_time(pid, &start_time);
    if (status == -ESRCH) /* dead already: the pidfd will say how */
        status = 0;
    if (status == 0)
        status = process_watch(loop, pid, pidfd, start_time, exited, arg, ret_process);
    if (status < 0) {
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        if (pidfd >= 0)
            close(pidfd);
    }
    return status;
}

int process_adopt(uv_loop_t *loop, const json_t *saved, process_exited *exited, void *arg,
                  struct process **ret_process) {
    json_int_t pid = json_integer_value(json_object_get(saved, "pid"));
    json_int_t start_time = json_integer_value(json_object_get(saved, "start_time"));
    const char *saved_boot = json_string_value(json_object_get(saved, "boot_id"));
    char boot_id[PROCESS_BOOT_ID_SIZE];
    if (pid <= 1 || pid > INT32_MAX || start_time <= 0 || !saved_boot)
        return -ERR_INVALID;
    int status = boot_id_read(boot_id);
    if (status < 0)
        return status;
    if (strcmp(saved_boot, boot_id) != 0)
        return -ESRCH;

    /* First the pidfd, then the look at who it is: the number cannot change hands in between. */
    cleanup_close int pidfd = pidfd_open((pid_t)pid, 0);
    if (pidfd < 0) /* EINVAL: a thread has this number now */
        return errno == EINVAL ? -ESRCH : -errno;
    uint64_t found = 0;
    status = process_read_start_time((pid_t)pid, &found);
    if (status < 0)
        return status;
    if (found != (uint64_t)start_time)
        return -ESRCH;
    status = process_watch(loop, (pid_t)pid, pidfd, found, exited, arg, ret_process);
    if (status == 0)
        pidfd = -1;
    return status;
}

int process_save(const struct process *p, json_t *object) {
    char boot_id[PROCESS_BOOT_ID_SIZE];
    int status = boot_id_read(boot_id);
    if (status < 0)
        return status;
    if (json_object_set_new(object, "pid", json_integer(p->pid)) < 0 ||
        json_object_set_new(object, "start_time", json_integer((json_int_t)p->start_time)) < 0 ||
        json_object_set_new(object, "boot_id", json_string(boot_id)) < 0)
        return -ENOMEM;
    return 0;
}

pid_t process_pid(const struct process *p) {
    return p->pid;
}

void process_kill(struct process *p) {
    if (pidfd_send_signal(p->pidfd, SIGKILL, NULL, 0) < 0 && errno != ESRCH)
        log_error("process %d cannot be killed: %s", (int)p->pid, strerror(errno));
}

void process_release(struct process *p) {
    if (!p)
        return;
    uv_close((uv_handle_t *)&p->poll, process_on_closed);
    close(p->pidfd); /* uv_close() has taken it out of the loop */
}

static int64_t clock_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

/* Reads until the end of the pipe, or until `end` (ms): -ETIMEDOUT. */
static int pipe_read(int fd, int64_t end, struct buf *output) {
    size_t left = 65536;
    for (;;) {
        char data[4096];
        int64_t wait = end - clock_ms();
        struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
        int ready = wait > 0 ? poll(&poll_fd, 1, (int)wait) : 0;
        if (ready < 0 && errno == EINTR)
            continue;
        if (ready <= 0)
            return ready < 0 ? -errno : -ETIMEDOUT;
        ssize_t length = read(fd, data, sizeof data);
        if (length <= 0)
            return length < 0 ? -errno : 0;
        size_t take = (size_t)length < left ? (size_t)length : left;
        buf_append(output, data, take);
        left -= take;
    }
}

/* What has closed its output may live on. */
static int pid_wait(pid_t pid, int64_t end) {
    cleanup_close int fd = pidfd_open(pid, 0);
    for (;;) {
        int64_t wait = end - clock_ms();
        struct pollfd poll_fd = {.fd = fd, .events = POLLIN};
        int ready = fd >= 0 && wait > 0 ? poll(&poll_fd, 1, (int)wait) : 0;
        if (ready < 0 && errno == EINTR)
            continue;
        return ready > 0 ? 0 : ready < 0 ? -errno : -ETIMEDOUT;
    }
}

int process_run(const char *program, char *const *argv, unsigned timeout_ms, struct buf *output) {
    int64_t end = clock_ms() + timeout_ms;
    char *env[] = {(char[]){"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, (char[]){"LC_ALL=C"}, NULL};
    struct process_options options = {
        .program = program, .argv = argv, .env = env, .fds = {-1, -1}};
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) < 0)
        return -errno;
    cleanup_close int from = fds[0];
    pid_t pid;
    int status = process_start(&options, fds[1], fds[1], &pid);
    close(fds[1]);
    if (status < 0)
        return status;
    int read_status = pipe_read(from, end, output);
    if (read_status == 0)
        read_status = pid_wait(pid, end);
    if (read_status < 0)
        kill(pid, SIGKILL);
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    if (read_status < 0 || output->failed)
        return read_status < 0 ? read_status : output->failed;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -EIO;
}

void process_last_words(const char *log, struct buf *output) {
    char data[1024];
    struct stat st;
    cleanup_close int fd = open(log, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        return;
    off_t from = st.st_size > (off_t)sizeof data ? st.st_size - (off_t)sizeof data : 0;
    ssize_t end = pread(fd, data, sizeof data, from);
    while (end > 0 && (data[end - 1] == '\n' || data[end - 1] == '\r' || data[end - 1] == ' '))
        end--;
    ssize_t start = end;
    while (start > 0 && data[start - 1] != '\n')
        start--;
    if (end - start > 400)
        end = start + 400;
    for (ssize_t i = start; i < end; i++)
        buf_append_char(output, data[i] >= 0x20 && data[i] < 0x7f ? data[i] : '?');
}
