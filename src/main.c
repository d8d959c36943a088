#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <uv.h>

#include "doctor/doctor.h"
#include "fuse/channel.h"
#include "fuse/options.h"
#include "proxy.h"
#include "tree/node.h"
#include "util/cleanup.h"
#include "util/log.h"
#include "util/notify.h"
#include "vm/daemon.h"

/* Start and end of the daemon.
 *
 * Whatever can be known to be wrong is looked for before the fork and before anything is mounted.
 * The starting process ends when the mount answers, or with the reason why there is none. */

/* How long VMs of an earlier daemon are waited for before the mount, so that they are not seen as
 * unreachable for nothing. */
#define SETTLE_MS 3000
#define SETTLE_STEP_MS 10
#define END_MS 1000 /* for guests to end what runs in them */

struct program {
    struct daemon daemon;
    struct fuse_channel *channel;
    uv_loop_t loop;
    uv_signal_t signals[3];
    uv_timer_t end_timer;
    uint64_t deadline; /* of the end */
    char *backend;     /* what new VMs run in, for the log */
    int report;        /* pipe to the starting process; -1: foreground */
    bool settled, ending;
    bool ready; /* it was mounted, and has answered */
};

static struct program program_self = {.report = -1};

static struct program *program_of(struct daemon *d) {
    return LIST_OWNER(d, struct program, daemon);
}

/* From here on nobody reads stderr. Not before there is a mount: until then whoever steps on an
 * automount point has to wait for us, but for the process group of systemd or automount(8). */
static void program_detach(struct program *p) {
    setsid();
    cleanup_buf struct buf path = {0};
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = STDIN_FILENO; null >= 0 && fd <= STDERR_FILENO; fd++)
        dup2(null, fd);
    if (null > STDERR_FILENO)
        close(null);
    buf_printf(&path, "%s/log", p->daemon.settings.state_dir);
    if (!path.failed)
        log_detach(path.data);
}

static void program_notify(const char *state) {
    cleanup_buf struct buf text = {0};
    buf_printf(&text, "%s\nMAINPID=%d\n", state, getpid());
    int r = text.failed ? -ENOMEM : service_notify(text.data);
    if (r < 0)
        log_warn("the service manager could not be told: %s", strerror(-r));
}

static void program_ready(struct daemon *d) {
    struct program *p = program_of(d);
    if (p->report >= 0)
        program_detach(p);
    p->ready = true;
    log_info("mounted on %s, with %s", d->settings.mountpoint, p->backend);
    program_notify("READY=1");
    if (p->report < 0)
        return;
    (void)!write(p->report, "", 1);
    close(p->report);
    p->report = -1;
}

/* Commands do not outlive the daemon, whose connections they hang on. They are ended in the guests
 * before those are closed; a guest that does not answer is not waited for. */
static void program_close_when_idle(uv_timer_t *timer) {
    struct program *p = timer->data;
    if (daemon_is_idle(&p->daemon) || uv_now(&p->loop) >= p->deadline) {
        uv_close((uv_handle_t *)timer, NULL);
        daemon_close(&p->daemon);
    }
}

static void program_end_commands(struct program *p) {
    daemon_end_commands(&p->daemon);
    p->deadline = uv_now(&p->loop) + END_MS;
    uv_timer_init(&p->loop, &p->end_timer);
    p->end_timer.data = p;
    uv_timer_start(&p->end_timer, program_close_when_idle, 0, SETTLE_STEP_MS);
}

static void program_end(struct program *p) {
    if (p->ending)
        return;
    p->ending = true;
    if (p->ready)
        log_info("unmounting");
    program_notify("STOPPING=1");
    fuse_channel_unmount(p->channel);
    daemon_end_session(&p->daemon);
    for (size_t i = 0; i < sizeof p->signals / sizeof *p->signals; i++)
        uv_close((uv_handle_t *)&p->signals[i], NULL);
    program_end_commands(p);
}

static void program_unmounted(struct daemon *d) {
    program_end(program_of(d));
}

static void program_signal(uv_signal_t *signal, int number) {
    log_info("signal %d", number);
    program_end(signal->data);
}

static void program_watch_signals(struct program *p) {
    static const int numbers[] = {SIGTERM, SIGINT, SIGHUP};
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a disk larger than the limit is an error, EFBIG */
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        uv_signal_init(&p->loop, &p->signals[i]);
        p->signals[i].data = p;
        uv_signal_start(&p->signals[i], program_signal, numbers[i]);
    }
}

static void program_settle_step(uv_timer_t *timer) {
    struct program *p = timer->data;
    p->settled = true;
}

/* Runs the loop until the VMs that were taken over are heard from. */
static void program_settle(struct program *p) {
    uv_timer_t timer;
    uint64_t start = uv_hrtime();
    uv_timer_init(&p->loop, &timer);
    timer.data = p;
    while (!p->ending && !daemon_is_settled(&p->daemon) &&
           uv_hrtime() - start < (uint64_t)SETTLE_MS * 1000000) {
        p->settled = false;
        uv_timer_start(&timer, program_settle_step, SETTLE_STEP_MS, 0);
        while (!p->settled)
            uv_run(&p->loop, UV_RUN_ONCE);
    }
    uv_close((uv_handle_t *)&timer, NULL);
    uv_run(&p->loop, UV_RUN_NOWAIT);
}

static void program_raise_limits(void) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

static int program_run(struct program *p) {
    cleanup_free char *why = NULL;
    int status = EXIT_FAILURE;

    program_raise_limits();
    if (uv_loop_init(&p->loop) < 0) {
        fprintf(stderr, "vmsfs: out of memory\n");
        return EXIT_FAILURE;
    }
    p->daemon.loop = &p->loop;
    program_watch_signals(p);
    if (daemon_open(&p->daemon, &why) < 0) {
        fprintf(stderr, "vmsfs: %s\n", why ? why : "out of memory");
    } else {
        program_settle(p);
        fuse_channel_on_ready(p->channel, program_ready);
        if (p->ending ||
            fuse_channel_mount(p->channel, p->daemon.settings.mountpoint, program_unmounted) < 0)
            fprintf(stderr, "vmsfs: nothing is mounted on %s\n", p->daemon.settings.mountpoint);
        else
            status = EXIT_SUCCESS;
    }
    if (status != EXIT_SUCCESS)
        program_end(p);
    uv_run(&p->loop, UV_RUN_DEFAULT);
    if (p->ready)
        log_info("ended");
    return status;
}

static void program_free(struct program *p) {
    fuse_channel_free(p->channel);
    daemon_free(&p->daemon);
    free(p->backend);
    if (p->daemon.loop && uv_loop_close(&p->loop) < 0)
        log_error("handles of the loop are left open");
    log_end();
    uv_library_shutdown();
}

/* In the starting process: waits for what the daemon reports. */
static int wait_for_mount(int report, pid_t pid, const char *mountpoint) {
    char byte;
    ssize_t n;
    struct statfs fs;
    do
        n = read(report, &byte, 1);
    while (n < 0 && errno == EINTR);
    if (n != 1) /* the daemon has said why on stderr */
        return EXIT_FAILURE;
    if (strncmp(mountpoint, "/dev/fd/", 8) == 0)
        return EXIT_SUCCESS;
    if (statfs(mountpoint, &fs) < 0 || fs.f_type != FUSE_SUPER_MAGIC) {
        fprintf(stderr, "vmsfs: the mount on %s does not answer (process %d): %s\n", mountpoint,
                pid, strerror(errno));
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}

/* Forks. In the daemon it returns -1, in the starting process the exit status. */
static int program_fork(struct program *p) {
    int report[2];
    if (pipe2(report, O_CLOEXEC) < 0) {
        perror("vmsfs: pipe");
        return EXIT_FAILURE;
    }
    pid_t pid = fork();
    if (pid < 0) {
        perror("vmsfs: fork");
        return EXIT_FAILURE;
    }
    if (pid > 0) {
        close(report[1]);
        int status = wait_for_mount(report[0], pid, p->daemon.settings.mountpoint);
        close(report[0]);
        return status;
    }
    close(report[0]);
    p->report = report[1];
    log_hold();
    return -1;
}

/* Names the options that nobody knows. */
static bool program_open_channel(struct program *p, struct options *options) {
    struct node *root = node_root_new(&p->daemon);
    p->channel =
        root ? fuse_channel_new(&p->daemon, options->fuse_argc, options->fuse_argv, root) : NULL;
    if (!p->channel && root)
        node_unref(root);
    return p->channel;
}

static int program_mount(struct program *p, struct options *options) {
    log_start(options->log_level);
    umask(077);
    /* First: before what unknown options would have changed is looked for. */
    if (!program_open_channel(p, options) || !options_check(options, &p->backend))
        return EXIT_FAILURE;
    int status = options->foreground ? -1 : program_fork(p);
    if (status < 0)
        status = chdir("/") < 0 ? EXIT_FAILURE : program_run(p);
    return status;
}

int main(int argc, char **argv) {
    struct program *p = &program_self;
    struct options options;
    int status = EXIT_FAILURE;

    if (argc == 4 && strcmp(argv[1], "--connect") == 0)
        return proxy_run(argv[2], argv[3]);
    bool ok = options_parse(argc, argv, &options);
    p->daemon.settings = options.settings;
    p->daemon.lock_fd = -1;
    if (ok && options.help) {
        options_print_help();
        fuse_channel_print_options();
        status = EXIT_SUCCESS;
    } else if (ok && options.version) {
        printf("vmsfs %s\n", VMSFS_VERSION);
        status = EXIT_SUCCESS;
    } else if (options.doctor) {
        bool known = ok && program_open_channel(p, &options);
        status = known ? doctor_run(&options) : DOCTOR_USAGE;
    } else if (ok) {
        status = program_mount(p, &options);
    }
    program_free(p);
    options_free_arguments(&options);
    return status;
}
