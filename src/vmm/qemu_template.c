/* Templates of QEMU: a machine is booted until its guest has opened the port through which it will
 * be told who it is, and is then saved.
 *
 * Its memory is a file that QEMU has mapped shared, so it is saved by itself, and the migration
 * stream holds the devices alone (capability x-ignore-shared). The stream goes to a descriptor that
 * is given to QEMU by QMP: `exec:`, which would do the same, is what the sandbox forbids. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "vmm/host.h"
#include "vmm/process.h"
#include "vmm/qemu_command.h"
#include "vmm/qmp.h"
#include "vmm/vmm.h"

#define TEMPLATE_MS 180000      /* for all of it, on a machine that has other things to do */
#define TEMPLATE_SETTLE_MS 1000 /* for what the guest's kernel does by itself after that */
#define TEMPLATE_STEP_MS 20     /* between questions how far it is */
#define TEMPLATE_COMMAND_MS 30000
#define TEMPLATE_FD "state" /* QEMU's name for the descriptor */

struct vmm_template {
    uv_loop_t *loop;
    void (*done)(void *arg, int status, const char *why);
    void *arg;
    struct process *process; /* owned */
    struct qmp *qmp;         /* owned */
    uv_timer_t deadline;
    uv_timer_t step;
    unsigned handles; /* of these two, not yet closed */
    char *socket;     /* owned; path */
    char *log;        /* owned; path, of QEMU's own output */
    char *state;      /* owned; path of the device state */
    bool waited;      /* the guest has opened its port */
    bool saved;
    char why[256]; /* the first thing that went wrong; or empty */
};

static void template_fail(struct vmm_template *t, const char *why) {
    if (!t->why[0])
        snprintf(t->why, sizeof t->why, "%s", why);
    process_kill(t->process);
}

static void template_on_exited(void *arg, const struct process_end *end) {
    struct vmm_template *t = arg;
    cleanup_buf struct buf why = {0};
    uv_timer_stop(&t->deadline);
    uv_timer_stop(&t->step);
    unlink(t->socket);
    qmp_abort(t->qmp, -ERR_GONE, "QEMU has ended");
    if (t->saved) {
        t->done(t->arg, 0, "");
        return;
    }
    buf_printf(&why, "%s%s(%s)", t->why, t->why[0] ? " " : "QEMU ended ", end->how);
    t->done(t->arg, -ERR_GONE, why.failed ? "QEMU ended" : why.data);
}

/* ---- saving ---- */

static void template_ask(uv_timer_t *timer);

static void template_on_progress(void *arg, int status, const json_t *result, const char *why) {
    struct vmm_template *t = arg;
    const char *state = json_string_value(json_object_get(result, "status"));
    if (status < 0) {
        template_fail(t, why);
    } else if (state && strcmp(state, "completed") == 0) {
        t->saved = true;
        qmp_command(t->qmp, "quit", NULL, TEMPLATE_COMMAND_MS, NULL, NULL);
    } else if (state && strcmp(state, "failed") == 0) {
        template_fail(t, "QEMU could not save the machine");
    } else {
        uv_timer_start(&t->step, template_ask, TEMPLATE_STEP_MS, 0);
    }
}

static void template_ask(uv_timer_t *timer) {
    struct vmm_template *t = timer->data;
    if (qmp_command(t->qmp, "query-migrate", NULL, TEMPLATE_COMMAND_MS, template_on_progress, t) <
        0)
        template_fail(t, "out of memory");
}

/* Success is seen by template_on_progress(). */
static void template_on_command(void *arg, int status, const json_t *result, const char *why) {
    (void)result;
    if (status < 0)
        template_fail(arg, why);
}

static void template_save(uv_timer_t *timer) {
    struct vmm_template *t = timer->data;
    json_t *capabilities = qemu_template_capabilities();
    json_t *to = json_pack("{s:s}", "uri", "fd:" TEMPLATE_FD);
    cleanup_close int fd =
        open(t->state, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    int status = fd < 0 ? -errno : capabilities && to ? 0 : -ENOMEM;
    if (status == 0) {
        status = qmp_command(t->qmp, "migrate-set-capabilities", capabilities, TEMPLATE_COMMAND_MS,
                             template_on_command, t);
        capabilities = NULL;
    }
    if (status == 0)
        status = qmp_give_fd(t->qmp, TEMPLATE_FD, fd, TEMPLATE_COMMAND_MS, template_on_command, t);
    if (status == 0) {
        status = qmp_command(t->qmp, "migrate", to, TEMPLATE_COMMAND_MS, template_on_command, t);
        to = NULL;
    }
    json_decref(capabilities);
    json_decref(to);
    if (status < 0)
        template_fail(t, strerror(-status));
    else
        template_ask(timer);
}

/* ---- the boot ---- */

static void template_on_event(void *arg, const char *name, const json_t *data) {
    struct vmm_template *t = arg;
    const char *id = json_string_value(json_object_get(data, "id"));
    if (strcmp(name, "VSERPORT_CHANGE") != 0 || !id || strcmp(id, QEMU_PORT) != 0 || t->waited ||
        !json_is_true(json_object_get(data, "open")))
        return;
    t->waited = true;
    uv_timer_start(&t->step, template_save, TEMPLATE_SETTLE_MS, 0);
}

static void template_on_lost(void *arg, int status, const char *why) {
    struct vmm_template *t = arg;
    (void)status;
    if (!t->saved)
        template_fail(t, why);
}

static void template_on_deadline(uv_timer_t *timer) {
    struct vmm_template *t = timer->data;
    template_fail(t, t->waited ? "QEMU did not save the machine in time"
                               : "the guest did not open its port in time");
}

static void template_on_closed(uv_handle_t *handle) {
    struct vmm_template *t = handle->data;
    if (--t->handles)
        return;
    free(t->socket);
    free(t->log);
    free(t->state);
    free(t);
}

static void qemu_template_release(struct vmm_template *t) {
    if (!t)
        return;
    if (t->process)
        process_kill(t->process);
    if (t->socket)
        unlink(t->socket);
    qmp_close(t->qmp);
    process_release(t->process);
    uv_close((uv_handle_t *)&t->deadline, template_on_closed);
    uv_close((uv_handle_t *)&t->step, template_on_closed);
}

static int template_spawn(struct vmm_template *t, const struct vmm_config *config, int listener) {
    cleanup_qemu_command struct qemu_command argv = {0}, env = {0};
    cleanup_free char *program = NULL, *serial = NULL;
    int status = qemu_program_find(&program);
    if (status < 0)
        return status;
    cleanup_close int ram =
        open(config->ram, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (ram < 0 || asprintf(&serial, "%s/serial.log", config->dir) < 0)
        return ram < 0 ? -errno : -ENOMEM;
    if ((status = qemu_command_build(&argv, config, program, host_has_kvm(NULL), PROCESS_FD,
                                     serial)) < 0 ||
        (status = qemu_command_build_env(&env, config->dir)) < 0)
        return status;
    struct process_options options = {
        .program = program,
        .argv = argv.items,
        .env = env.items,
        .log = t->log,
        .fds = {listener, -1},
        .idle = true,
        .transient = true, /* nobody would adopt it */
    };
    return process_spawn(t->loop, &options, template_on_exited, t, &t->process);
}

static int qemu_template_make(uv_loop_t *loop, const struct vmm_config *config,
                              void (*done)(void *arg, int status, const char *why), void *arg,
                              struct vmm_template **ret_template) {
    static const struct qmp_events events = {.event = template_on_event, .lost = template_on_lost};
    struct vmm_template *t = calloc(1, sizeof *t);
    if (!t)
        return -ENOMEM;
    *t = (struct vmm_template){.loop = loop, .done = done, .arg = arg, .handles = 2};
    uv_timer_init(loop, &t->deadline); /* these cannot fail */
    uv_timer_init(loop, &t->step);
    t->deadline.data = t->step.data = t;
    t->socket = strdup(config->socket);
    t->state = strdup(config->device_state);
    cleanup_close int listener = qemu_listen(config->socket);
    int status = listener < 0 ? listener : 0;
    if (asprintf(&t->log, "%s/vmm.log", config->dir) < 0)
        t->log = NULL;
    if (!t->socket || !t->state || !t->log)
        status = -ENOMEM;
    if (status == 0)
        status = qmp_open(loop, t->socket, TEMPLATE_MS, &events, t, &t->qmp);
    if (status == 0)
        status = template_spawn(t, config, listener);
    if (status < 0) {
        qemu_template_release(t);
        return status;
    }
    uv_timer_start(&t->deadline, template_on_deadline, TEMPLATE_MS, 0);
    *ret_template = t;
    return 0;
}

/* ---- what makes a template useless ---- */

/* The CPU that KVM hands on, as far as its first lines in /proc/cpuinfo tell. */
static int fingerprint_cpu(struct buf *out) {
    char text[4096];
    cleanup_close int fd = open("/proc/cpuinfo", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (length < 0)
        return -errno;
    text[length] = '\0';
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (strncmp(line, "model name", 10) == 0 || strncmp(line, "microcode", 9) == 0 ||
            strncmp(line, "flags", 5) == 0) {
            buf_printf(out, "%s\n", line);
            if (line[0] == 'f')
                break;
        }
    return 0;
}

static int qemu_template_fingerprint(const struct vmm_config *config, struct buf *out) {
    cleanup_qemu_command struct qemu_command argv = {0};
    cleanup_free char *program = NULL;
    struct vmm_config neutral = *config;
    struct utsname host;
    struct stat st;
    bool kvm = host_has_kvm(NULL);
    neutral.id = "template";
    neutral.ram = "ram";
    neutral.identity = NULL;
    int status = qemu_program_find(&program);
    if (status == 0)
        status = qemu_command_build(&argv, &neutral, program, kvm, PROCESS_FD, "serial.log");
    if (status == 0 && stat(program, &st) < 0)
        status = -errno;
    if (status < 0)
        return status;
    for (size_t i = 0; i < argv.count; i++)
        buf_printf(out, "%s\n", argv.items[i]);
    buf_printf(out, "%s %llu %lld %lld.%09ld\n", program, (unsigned long long)st.st_ino,
               (long long)st.st_size, (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    if (!kvm)
        return 0;
    if (uname(&host) == 0)
        buf_printf(out, "%s\n", host.release);
    return fingerprint_cpu(out);
}

const struct vmm_template_ops qemu_template_ops = {
    .fingerprint = qemu_template_fingerprint,
    .make = qemu_template_make,
    .release = qemu_template_release,
};
