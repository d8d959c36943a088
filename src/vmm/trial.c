#include "vmm/trial.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "vmm/host.h"

/* Without an initrd and without a disk, this is the last that a kernel says (init/do_mounts.c):
 * memory, interrupts, timers, all CPUs and the drivers have come up before. */
#define TRIAL_SIGN "VFS: Unable to mount root fs"

#define TRIAL_STEP_MS 20
#define TRIAL_CONSOLE_MOST 262144

/* They end the trial first, and then this process. */
static const int trial_signals[] = {SIGINT, SIGTERM, SIGHUP};
#define TRIAL_SIGNALS (sizeof trial_signals / sizeof *trial_signals)

struct trial {
    uv_loop_t loop;
    uv_timer_t step;
    uv_signal_t signals[TRIAL_SIGNALS];
    int signal;          /* that has come; or 0 */
    struct vmm *vmm;     /* owned */
    const char *console; /* path */
    uint64_t begun, most_ms;
    bool ended;    /* the VMM */
    bool booted;   /* the kernel has said so */
    unsigned took; /* ms, if it has */
    char *why;     /* owned; the first thing that went wrong; or NULL */
};

static void trial_fail(struct trial *t, const char *why) {
    if (!t->why && !t->booted)
        t->why = strdup(why);
}

static void trial_look(struct trial *t) {
    cleanup_buf struct buf text = {0};
    if (t->booted || fs_read(t->console, TRIAL_CONSOLE_MOST, &text) < 0 || !text.len ||
        !memmem(text.data, text.len, TRIAL_SIGN, strlen(TRIAL_SIGN)))
        return;
    t->booted = true;
    t->took = (unsigned)(uv_now(&t->loop) - t->begun);
}

static void trial_step(uv_timer_t *timer) {
    struct trial *t = timer->data;
    char text[64];
    trial_look(t);
    bool late = uv_now(&t->loop) - t->begun >= t->most_ms;
    if (!t->booted && !late)
        return;
    snprintf(text, sizeof text, "the kernel has not come up within %llu s",
             (unsigned long long)t->most_ms / 1000);
    trial_fail(t, text);
    uv_timer_stop(timer);
    t->vmm->ops->kill(t->vmm);
}

static void trial_on_signal(uv_signal_t *handle, int signal) {
    struct trial *t = handle->data;
    t->signal = signal;
    trial_fail(t, "interrupted");
    t->vmm->ops->kill(t->vmm);
}

static void trial_on_ready(void *arg) {
    (void)arg; /* the VMM is; the kernel is another matter */
}

static void trial_on_exited(void *arg, enum vmm_end end, const char *why, const char *words) {
    struct trial *t = arg;
    cleanup_buf struct buf text = {0};
    (void)end;
    t->ended = true;
    trial_look(t);
    buf_printf(&text, "%s%s%s", why, words[0] ? "; its last words: " : "", words);
    trial_fail(t, text.failed ? why : text.data);
    uv_stop(&t->loop);
}

static void trial_on_trouble(void *arg, const char *why) {
    (void)arg, (void)why; /* if it matters, the VMM will not boot anything */
}

static int trial_run(struct trial *t, const struct vmm_ops *ops, const struct vmm_config *config) {
    static const struct vmm_events events = {
        .ready = trial_on_ready, .exited = trial_on_exited, .trouble = trial_on_trouble};
    int status = ops->prepare ? ops->prepare(config, &t->why) : 0;
    if (status < 0)
        return status;
    t->begun = uv_now(&t->loop);
    status = ops->create(&t->loop, config, &events, t, &t->vmm);
    if (status < 0)
        return status;
    uv_timer_start(&t->step, trial_step, TRIAL_STEP_MS, TRIAL_STEP_MS);
    for (size_t i = 0; i < TRIAL_SIGNALS; i++)
        uv_signal_start(&t->signals[i], trial_on_signal, trial_signals[i]);
    while (!t->ended)
        uv_run(&t->loop, UV_RUN_DEFAULT);
    ops->release(t->vmm);
    return t->booted ? 0 : -ENODEV;
}

/* In `dir`, which is there. */
static int trial_run_in(const char *dir, const struct vmm_ops *ops, const struct vmm_config *wanted,
                        struct trial *t) {
    cleanup_free char *socket = host_join(dir, "socket"), *console = host_join(dir, "serial.log");
    struct vmm_config config = *wanted;
    config.id = "trial";
    config.dir = dir;
    config.socket = socket;
    config.initrd = config.disk = config.tap = config.jail_user = NULL;
    config.transient = true;
    if (!socket || !console)
        return -ENOMEM;
    t->console = console;
    int status = uv_loop_init(&t->loop);
    if (status < 0)
        return status;
    uv_timer_init(&t->loop, &t->step);
    t->step.data = t;
    for (size_t i = 0; i < TRIAL_SIGNALS; i++) {
        uv_signal_init(&t->loop, &t->signals[i]);
        t->signals[i].data = t;
    }
    status = trial_run(t, ops, &config);
    uv_close((uv_handle_t *)&t->step, NULL);
    for (size_t i = 0; i < TRIAL_SIGNALS; i++)
        uv_close((uv_handle_t *)&t->signals[i], NULL);
    uv_run(&t->loop, UV_RUN_DEFAULT); /* closes what is to be closed */
    uv_loop_close(&t->loop);
    return status;
}

/* 0 would still let it dump into a program, 1 does neither (fs/coredump.c). */
static void trial_leave_no_core(void) {
    const struct rlimit none = {1, 1};
    setrlimit(RLIMIT_CORE, &none);
}

/* Bytes of $TMPDIR, so that the paths of sockets are no longer than they may be. */
#define TRIAL_BASE_MOST 64

int vmm_trial(const struct vmm_ops *ops, const struct vmm_config *config, unsigned most_ms,
              unsigned *ret_ms, char **ret_why) {
    struct trial t = {.most_ms = most_ms};
    const char *base = getenv("TMPDIR");
    bool fits = base && base[0] == '/' && strlen(base) <= TRIAL_BASE_MOST;
    cleanup_free char *dir = host_join(fits ? base : "/tmp", "vmsfs-trial.XXXXXX");
    *ret_why = NULL;
    if (!dir)
        return -ENOMEM;
    if (!mkdtemp(dir))
        return error_explain(-errno, ret_why, "%s cannot be made: %s", dir, strerror(errno));
    trial_leave_no_core();
    void (*before)(int) = signal(SIGPIPE, SIG_IGN); /* a VMM may die before it is told anything */
    int status = trial_run_in(dir, ops, config, &t);
    signal(SIGPIPE, before);
    fs_remove_all(dir);
    if (t.signal)
        raise(t.signal);
    *ret_why = t.why;
    if (status == 0)
        *ret_ms = t.took;
    return status;
}
