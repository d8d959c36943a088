/* QEMU as a backend.
 *
 * The daemon makes QMP's listening socket and hands it to QEMU, as libvirt does: its own connection
 * is then in the queue before QEMU even starts, and there is no moment at which the path is not
 * there yet. A later daemon connects by the path.
 *
 * What is true is what the process says: QMP going away is no end of the VM, the pidfd is. A lost
 * connection is made anew by the next command. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/list.h"
#include "util/log.h"
#include "vmm/host.h"
#include "vmm/process.h"
#include "vmm/qemu_command.h"
#include "vmm/qmp.h"
#include "vmm/usernet.h"
#include "vmm/vmm.h"

#define QEMU_START_MS 10000 /* until QMP answers */
#define QEMU_GRACE_MS 1000  /* for an end that has begun, with QMP gone already */
#define QEMU_RETRY_MS 50    /* between questions for the port */
#define QEMU_PRESS_MS 2000  /* between presses of the power button */
#define QEMU_PAUSE_MS 5000  /* QMP's answer to stop and cont */
#define QEMU_GUEST_SSH 22

enum qemu_stage {
    STAGE_STARTING,
    STAGE_RUNNING,
    STAGE_POWERDOWN, /* the guest was asked to power down */
    STAGE_QUIT,      /* QEMU was asked to quit */
    STAGE_KILLED,
    STAGE_EXITED,
};

/* How far its start from a template is. */
enum qemu_template {
    TEMPLATE_NONE,   /* it has none, or runs on from it */
    TEMPLATE_UNTOLD, /* it was not told of it yet */
    TEMPLATE_TOLD,   /* and loads it */
    TEMPLATE_REFUSED,
};

struct qemu {
    struct vmm vmm;
    uv_loop_t *loop;
    struct vmm_events events;
    void *arg;
    struct process *process; /* owned; NULL until spawned */
    struct qmp *qmp;         /* owned; perhaps lost, see qemu_connect() */
    uv_timer_t deadline;     /* of the stage */
    uv_timer_t retry;        /* asks for the port, or presses the power button, again */
    unsigned handles;        /* of these two, not yet closed */
    enum qemu_stage stage;
    bool kvm;
    enum qemu_template template;
    uint16_t port;                        /* 0: not known yet */
    unsigned quit_ms;                     /* of stop() */
    vmm_paused *paused;                   /* of pause(); or NULL */
    char *socket;                         /* owned; path */
    char *log;                            /* owned; path, of QEMU's own output */
    const struct qemu_shutdown *shutdown; /* why QEMU ends, as QMP has told it; or NULL */
    char killed_for[200];                 /* why it had or will have to be killed; or empty */
};

static struct qemu *qemu_of(const struct vmm *vmm) {
    return (struct qemu *)(void *)vmm;
}

static void qemu_on_timer_closed(uv_handle_t *handle) {
    struct qemu *q = handle->data;
    if (--q->handles)
        return;
    free(q->socket);
    free(q->log);
    free(q);
}

static void qemu_release(struct vmm *vmm) {
    struct qemu *q = qemu_of(vmm);
    qmp_close(q->qmp);
    process_release(q->process);
    uv_close((uv_handle_t *)&q->deadline, qemu_on_timer_closed);
    uv_close((uv_handle_t *)&q->retry, qemu_on_timer_closed);
}

/* ---- the end ---- */

/* QMP's ShutdownCause, for the user. */
static const struct qemu_shutdown {
    const char *cause, *text;
    enum vmm_end end;
} qemu_shutdowns[] = {
    {"guest-shutdown", "the guest has powered off", VMM_POWERED_OFF},
    {"guest-reset", "the guest has restarted, or its kernel has panicked", VMM_ENDED},
    {"guest-panic", "the guest's kernel has panicked", VMM_ENDED},
    {"host-qmp-quit", "it was told to quit", VMM_ENDED},
    {"host-signal", "it was told to by a signal", VMM_HINDERED},
    {"host-error", "an error on the host", VMM_ENDED},
};

static void qemu_on_event(void *arg, const char *name, const json_t *data) {
    struct qemu *q = arg;
    const char *cause = json_string_value(json_object_get(data, "reason"));
    if (strcmp(name, "RESUME") == 0)
        q->template = TEMPLATE_NONE;
    if (strcmp(name, "SHUTDOWN") != 0 || !cause)
        return;
    for (size_t i = 0; i < sizeof qemu_shutdowns / sizeof *qemu_shutdowns; i++)
        if (strcmp(cause, qemu_shutdowns[i].cause) == 0)
            q->shutdown = &qemu_shutdowns[i];
}

/* A template that QEMU cannot load makes it exit with a status that is none of success, or crash.
 * What ails it before it was told to load it is something else. And with no guest yet that could
 * end it, and no word in QMP, status 0 is a signal. */
static enum vmm_end qemu_judge_end(const struct qemu *q, const struct process_end *end) {
    if (q->template == TEMPLATE_REFUSED)
        return VMM_REFUSED;
    if (q->shutdown && q->shutdown->end != VMM_ENDED)
        return q->shutdown->end;
    if (q->stage == STAGE_KILLED)
        return VMM_ENDED;
    if (process_was_killed(end) || q->template == TEMPLATE_UNTOLD)
        return VMM_HINDERED;
    if (q->template == TEMPLATE_TOLD)
        return end->status == 0 ? VMM_HINDERED : VMM_REFUSED;
    return VMM_ENDED;
}

static void qemu_on_exited(void *arg, const struct process_end *end) {
    struct qemu *q = arg;
    cleanup_buf struct buf why = {0};
    if (q->stage == STAGE_KILLED && q->killed_for[0])
        buf_printf(&why, "%s, so QEMU was killed", q->killed_for);
    else
        buf_printf(&why, "QEMU ended (%s)", end->how);
    if (q->shutdown)
        buf_printf(&why, ": %s", q->shutdown->text);
    cleanup_buf struct buf words = {0};
    process_last_words(q->log, &words);

    enum vmm_end verdict = qemu_judge_end(q, end);
    q->stage = STAGE_EXITED;
    uv_timer_stop(&q->deadline);
    uv_timer_stop(&q->retry);
    unlink(q->socket);
    qmp_abort(q->qmp, -ERR_GONE, "QEMU has ended");
    q->events.exited(q->arg, verdict, why.failed ? "QEMU ended" : why.data,
                     words.len && !words.failed ? words.data : "");
}

static void qemu_kill(struct vmm *vmm) {
    struct qemu *q = qemu_of(vmm);
    if (q->stage == STAGE_EXITED)
        return;
    q->stage = STAGE_KILLED;
    uv_timer_stop(&q->deadline);
    uv_timer_stop(&q->retry);
    process_kill(q->process);
}

/* ---- the start ---- */

static void qemu_on_deadline(uv_timer_t *timer);

static void qemu_set_deadline(struct qemu *q, unsigned ms) {
    uv_update_time(q->loop); /* it counts from now, whatever this turn has done before */
    uv_timer_start(&q->deadline, qemu_on_deadline, ms, 0);
}

static void qemu_become_ready(struct qemu *q) {
    if (q->stage != STAGE_STARTING)
        return;
    q->stage = STAGE_RUNNING;
    uv_timer_stop(&q->deadline);
    uv_timer_stop(&q->retry);
    q->events.ready(q->arg);
}

static void qemu_on_usernet(void *arg, int status, const json_t *result, const char *why);

static void qemu_ask_port(uv_timer_t *timer) {
    struct qemu *q = timer->data;
    json_t *arguments = json_pack("{s:s}", "command-line", "info usernet");
    if (!arguments || qmp_command(q->qmp, "human-monitor-command", arguments, QEMU_START_MS,
                                  qemu_on_usernet, q) < 0)
        uv_timer_start(&q->retry, qemu_ask_port, QEMU_RETRY_MS, 0);
}

static void qemu_on_usernet(void *arg, int status, const json_t *result, const char *why) {
    struct qemu *q = arg;
    (void)why; /* told by qemu_on_lost(), or by the deadline */
    if (q->stage != STAGE_STARTING)
        return;
    uint16_t port = 0;
    if (status == 0 && json_is_string(result))
        port = usernet_find_port(json_string_value(result), json_string_length(result),
                                 QEMU_GUEST_SSH);
    if (port) {
        q->port = port;
        qemu_become_ready(q);
    } else if (status == 0 || status == -ERR_IO) {
        uv_timer_start(&q->retry, qemu_ask_port, QEMU_RETRY_MS, 0);
    }
}

static void qemu_on_lost(void *arg, int status, const char *why) {
    struct qemu *q = arg;
    if (q->stage == STAGE_EXITED)
        return;
    log_debug("QEMU %d: %s", (int)process_pid(q->process), why);
    if (q->stage != STAGE_STARTING)
        return;
    /* Most likely QEMU did not like something and is about to end, with better words than ours. */
    if (status == -ERR_TIMED_OUT)
        snprintf(q->killed_for, sizeof q->killed_for, "QMP did not answer within %d s",
                 QEMU_START_MS / 1000);
    else
        snprintf(q->killed_for, sizeof q->killed_for, "QEMU cannot be controlled: %s", why);
    qemu_set_deadline(q, status == -ERR_TIMED_OUT ? 1 : QEMU_GRACE_MS);
}

static const struct qmp_events qemu_qmp_events = {
    .event = qemu_on_event,
    .lost = qemu_on_lost,
};

/* Connects anew if the connection is lost. The old client stays where that fails: it answers every
 * command with the reason. */
static struct qmp *qemu_connect(struct qemu *q) {
    struct qmp *fresh;
    if (q->stage != STAGE_EXITED && qmp_is_lost(q->qmp) &&
        qmp_open(q->loop, q->socket, QEMU_START_MS, &qemu_qmp_events, q, &fresh) == 0) {
        qmp_close(q->qmp);
        q->qmp = fresh;
    }
    return q->qmp;
}

/* ---- stopping ---- */

static void qemu_on_quit(void *arg, int status, const json_t *result, const char *why) {
    struct qemu *q = arg;
    (void)result;
    if (status == 0 || q->stage != STAGE_QUIT)
        return;
    snprintf(q->killed_for, sizeof q->killed_for, "QEMU could not be told to quit (%s)", why);
    if (uv_timer_get_due_in(&q->deadline) > QEMU_GRACE_MS)
        qemu_set_deadline(q, QEMU_GRACE_MS);
}

static void qemu_quit(struct qemu *q) {
    q->stage = STAGE_QUIT;
    uv_timer_stop(&q->retry);
    q->killed_for[0] = '\0';
    qemu_set_deadline(q, q->quit_ms);
    qmp_command(qemu_connect(q), "quit", NULL, q->quit_ms, qemu_on_quit, q);
}

static void qemu_on_powerdown(void *arg, int status, const json_t *result, const char *why) {
    struct qemu *q = arg;
    (void)result, (void)why;
    if (status < 0 && q->stage == STAGE_POWERDOWN)
        qemu_quit(q);
}

/* Again and again: a guest that still boots loses the first ones, and QEMU answers success to all.
 */
static void qemu_press_power(uv_timer_t *timer) {
    struct qemu *q = timer->data;
    struct qmp *qmp = qemu_connect(q);
    unsigned left = (unsigned)uv_timer_get_due_in(&q->deadline);
    if (q->stage != STAGE_POWERDOWN)
        return;
    uv_timer_start(timer, qemu_press_power, QEMU_PRESS_MS, 0);
    /* A paused guest sees no power button. */
    qmp_command(qmp, "cont", NULL, left, NULL, NULL);
    if (qmp_command(qmp, "system_powerdown", NULL, left, qemu_on_powerdown, q) < 0)
        qemu_quit(q);
}

static void qemu_stop(struct vmm *vmm, unsigned powerdown_ms, unsigned quit_ms) {
    struct qemu *q = qemu_of(vmm);
    if (q->stage >= STAGE_KILLED)
        return;
    bool again = q->stage >= STAGE_POWERDOWN;
    q->quit_ms = quit_ms;
    uv_timer_stop(&q->retry);
    q->killed_for[0] = '\0';
    /* Again: more haste is granted, more time is not. */
    unsigned left = again ? (unsigned)uv_timer_get_due_in(&q->deadline) : UINT32_MAX;
    unsigned wanted = q->stage == STAGE_QUIT ? quit_ms : powerdown_ms;
    qemu_set_deadline(q, wanted < left ? wanted : left);
    if (q->stage == STAGE_QUIT)
        return;
    if (!powerdown_ms) {
        qemu_quit(q);
        return;
    }
    q->stage = STAGE_POWERDOWN;
    qemu_press_power(&q->retry);
}

static void qemu_on_deadline(uv_timer_t *timer) {
    struct qemu *q = timer->data;
    switch (q->stage) {
    case STAGE_STARTING:
        if (q->port) {
            /* Adopted, and the guest is reachable as before: no reason to end it. */
            log_warn("QEMU %d: %s; going on without", (int)process_pid(q->process),
                     q->killed_for[0] ? q->killed_for : "QMP does not answer");
            q->killed_for[0] = '\0';
            qemu_become_ready(q);
            break;
        }
        if (!q->killed_for[0])
            snprintf(q->killed_for, sizeof q->killed_for, "QMP did not answer within %d s",
                     QEMU_START_MS / 1000);
        qemu_kill(&q->vmm);
        break;
    case STAGE_POWERDOWN:
        qemu_quit(q);
        break;
    case STAGE_QUIT:
        if (!q->killed_for[0])
            snprintf(q->killed_for, sizeof q->killed_for, "QEMU did not quit within %u ms",
                     q->quit_ms);
        qemu_kill(&q->vmm);
        break;
    default:
        break;
    }
}

/* ---- pausing ---- */

static void qemu_on_paused(void *arg, int status, const json_t *result, const char *why) {
    struct qemu *q = arg;
    vmm_paused *done = q->paused;
    (void)result;
    q->paused = NULL;
    if (done && q->stage == STAGE_RUNNING)
        done(q->arg, status, why ? why : "", "");
}

static void qemu_pause(struct vmm *vmm, bool paused, vmm_paused *done) {
    struct qemu *q = qemu_of(vmm);
    q->paused = done;
    qmp_command(qemu_connect(q), paused ? "stop" : "cont", NULL, QEMU_PAUSE_MS, qemu_on_paused, q);
}

/* ---- create and adopt ---- */

static int qemu_new(uv_loop_t *loop, const struct vmm_config *config, const char *socket,
                    const struct vmm_events *events, void *arg, struct qemu **ret_qemu) {
    struct qemu *q = calloc(1, sizeof *q);
    if (!q)
        return -ENOMEM;
    *q = (struct qemu){
        .vmm.ops = &qemu_ops,
        .loop = loop,
        .events = *events,
        .arg = arg,
        .handles = 2,
        .socket = strdup(socket),
        .log = host_join(config->dir, "vmm.log"),
    };
    uv_timer_init(loop, &q->deadline); /* these cannot fail */
    uv_timer_init(loop, &q->retry);
    q->deadline.data = q->retry.data = q;
    if (!q->socket || !q->log) {
        qemu_release(&q->vmm);
        return -ENOMEM;
    }
    *ret_qemu = q;
    return 0;
}

/* Names for the file of the identity as QEMU's `pipe` wants them. */
static int qemu_link_port(const char *identity) {
    const struct {
        const char *suffix, *target;
    } links[] = {{QEMU_PORT_SUFFIX ".in", identity}, {QEMU_PORT_SUFFIX ".out", "/dev/null"}};
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        cleanup_buf struct buf path = {0};
        buf_printf(&path, "%s%s", identity, links[i].suffix);
        if (path.failed)
            return path.failed;
        unlink(path.data);
        if (symlink(links[i].target, path.data) < 0)
            return -errno;
    }
    return 0;
}

static void qemu_on_restoring(void *arg, int status, const json_t *result, const char *why) {
    struct qemu *q = arg;
    (void)result;
    if (status == 0 || q->stage != STAGE_STARTING)
        return;
    if (status == -ERR_IO) /* QEMU's own answer */
        q->template = TEMPLATE_REFUSED;
    if (!q->killed_for[0])
        snprintf(q->killed_for, sizeof q->killed_for, "QEMU does not take the template: %s", why);
    qemu_set_deadline(q, QEMU_GRACE_MS);
}

/* From here on it does not need this daemon any more. */
static void qemu_on_restored(void *arg, int status, const json_t *result, const char *why) {
    struct qemu *q = arg;
    if (status == 0)
        q->template = TEMPLATE_TOLD;
    qemu_on_restoring(arg, status, result, why);
}

/* Tells it where it goes on from. */
static int qemu_restore(struct qemu *q) {
    char uri[32];
    snprintf(uri, sizeof uri, "fd:%d", QEMU_STATE_FD);
    json_t *capabilities = qemu_template_capabilities(), *from = json_pack("{s:s}", "uri", uri);
    int status = capabilities ? qmp_command(q->qmp, "migrate-set-capabilities", capabilities,
                                            QEMU_START_MS, qemu_on_restoring, q)
                              : -ENOMEM;
    if (status < 0) {
        json_decref(from);
        return status;
    }
    q->template = TEMPLATE_UNTOLD;
    return from ? qmp_command(q->qmp, "migrate-incoming", from, QEMU_START_MS, qemu_on_restored, q)
                : -ENOMEM;
}

static int qemu_spawn(struct qemu *q, const struct vmm_config *config, int listener) {
    cleanup_qemu_command struct qemu_command argv = {0}, env = {0};
    cleanup_free char *program = NULL;
    cleanup_free char *serial = host_join(config->dir, "serial.log");
    int status = serial ? qemu_program_find(&program) : -ENOMEM;
    if (status < 0)
        return status;
    /* QEMU would create it for all to read. */
    cleanup_close int fd =
        open(serial, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    cleanup_close int state =
        config->ram ? open(config->device_state, O_RDONLY | O_CLOEXEC | O_NOFOLLOW) : -1;
    if (config->ram && (state < 0 || (status = qemu_link_port(config->identity)) < 0))
        return status < 0 ? status : -errno;
    if ((status = qemu_command_build(&argv, config, program, q->kvm, PROCESS_FD, serial)) < 0 ||
        (status = qemu_command_build_env(&env, config->dir)) < 0)
        return status;
    struct process_options options = {
        .program = program,
        .argv = argv.items,
        .env = env.items,
        .log = q->log,
        .fds = {listener, state},
        .transient = config->transient,
    };
    return process_spawn(q->loop, &options, qemu_on_exited, q, &q->process);
}

static int qemu_create(uv_loop_t *loop, const struct vmm_config *config,
                       const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    struct qemu *q;
    int status = qemu_new(loop, config, config->socket, events, arg, &q);
    if (status < 0)
        return status;
    q->kvm = host_has_kvm(NULL);
    cleanup_close int listener = qemu_listen(q->socket);
    if (listener < 0) {
        qemu_release(&q->vmm);
        return listener;
    }
    /* Spawning comes last: there is nothing to take back behind it. */
    status = qmp_open(loop, q->socket, QEMU_START_MS, &qemu_qmp_events, q, &q->qmp);
    if (status == 0 && config->ram)
        status = qemu_restore(q);
    if (status == 0)
        status = qemu_spawn(q, config, listener);
    if (status < 0) {
        unlink(q->socket);
        qemu_release(&q->vmm);
        return status;
    }
    qemu_set_deadline(q, QEMU_START_MS);
    qemu_ask_port(&q->retry);
    *ret_vmm = &q->vmm;
    return 0;
}

static int qemu_adopt(uv_loop_t *loop, const struct vmm_config *config, const json_t *saved,
                      const struct vmm_events *events, void *arg, struct vmm **ret_vmm) {
    struct qemu *q;
    const char *socket = json_string_value(json_object_get(saved, "socket"));
    const char *accel = json_string_value(json_object_get(saved, "accel"));
    json_int_t port = json_integer_value(json_object_get(saved, "port"));
    if (!socket)
        return -ERR_INVALID;
    int status = qemu_new(loop, config, socket, events, arg, &q);
    if (status < 0)
        return status;
    q->kvm = accel && strcmp(accel, "kvm") == 0;
    q->port = port > 0 && port <= UINT16_MAX ? (uint16_t)port : 0;
    status = process_adopt(loop, saved, qemu_on_exited, q, &q->process);
    if (status == -ESRCH)
        unlink(q->socket);
    if (status == 0)
        status = qmp_open(loop, q->socket, QEMU_START_MS, &qemu_qmp_events, q, &q->qmp);
    if (status < 0) {
        qemu_release(&q->vmm);
        return status;
    }
    qemu_set_deadline(q, QEMU_START_MS);
    qemu_ask_port(&q->retry);
    *ret_vmm = &q->vmm;
    return 0;
}

static unsigned qemu_end_strays(const char *dir) {
    cleanup_free char *serial = host_join(dir, "serial.log");
    cleanup_buf struct buf option = {0};
    if (serial)
        qemu_command_print_path(&option, "path=", serial, ",append=on");
    return serial && !option.failed ? process_kill_strays(option.data) : 0;
}

static json_t *qemu_save(const struct vmm *vmm) {
    const struct qemu *q = qemu_of(vmm);
    if (q->stage == STAGE_EXITED || q->template == TEMPLATE_UNTOLD ||
        q->template == TEMPLATE_REFUSED)
        return NULL;
    json_t *saved = json_pack("{s:s, s:i, s:s}", "socket", q->socket, "port", q->port, "accel",
                              q->kvm ? "kvm" : "tcg");
    if (saved && process_save(q->process, saved) < 0) {
        json_decref(saved);
        saved = NULL;
    }
    return saved;
}

static bool qemu_endpoint(const struct vmm *vmm, struct vmm_endpoint *ret_endpoint) {
    const struct qemu *q = qemu_of(vmm);
    if (!q->port || q->stage == STAGE_EXITED)
        return false;
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons(q->port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    *ret_endpoint = (struct vmm_endpoint){.length = sizeof address};
    memcpy(&ret_endpoint->address, &address, sizeof address);
    return true;
}

static void qemu_describe(const struct vmm *vmm, json_t *info) {
    const struct qemu *q = qemu_of(vmm);
    json_object_set_new(info, "accelerator", json_string(q->kvm ? "kvm" : "tcg"));
    if (q->stage == STAGE_EXITED)
        return;
    json_object_set_new(info, "pid", json_integer(process_pid(q->process)));
    if (!q->port)
        return;
    json_object_set_new(info, "address", json_string("127.0.0.1"));
    json_object_set_new(info, "port", json_integer(q->port));
}

/* ---- check ---- */

static int qemu_check(char **ret_why) {
    cleanup_free char *program = NULL;
    cleanup_buf struct buf why = {0}, output = {0};
    int status = qemu_program_find(&program);
    if (status == -ENOENT) {
        buf_printf(&why, "qemu-system-x86_64 is not installed (apt install qemu-system-x86)");
    } else if (status == 0) {
        char *argv[] = {program, (char[]){"--version"}, NULL};
        status = process_run(program, argv, 5000, &output);
        /* `QEMU emulator version 7.2.22 (Debian …)` */
        static const char before[] = "version ";
        const char *version = output.len ? strstr(output.data, before) : NULL;
        const char *no_kvm = NULL;
        if (status != 0 || !version) {
            buf_printf(&why, "%s --version does not work (%s); reinstall qemu-system-x86", program,
                       status < 0 ? strerror(-status) : "it fails");
            status = status == -ETIMEDOUT ? -ERR_TIMED_OUT : -ERR_UNSUPPORTED;
        } else {
            version += sizeof before - 1;
            bool kvm = host_has_kvm(&no_kvm);
            buf_printf(&why, "QEMU %.*s %s KVM%s%s%s", (int)strcspn(version, " \r\n("), version,
                       kvm ? "with" : "without", kvm ? "" : " (", kvm ? "" : no_kvm,
                       kvm ? "" : "): guests are emulated");
        }
    }
    *ret_why = why.len ? buf_steal(&why, NULL) : NULL;
    return status;
}

static void qemu_add_misfits(const struct vmm_config *config, struct buf *out) {
    const char *model = config->cpu_model ? config->cpu_model : "";
    if (strcspn(model, ",") == 4 && strncmp(model, "host", 4) == 0) {
        if (!host_has_kvm(NULL))
            vmm_add_misfit(out, "config/cpu_model asks for the host's CPU, which takes KVM (max is "
                                "the most without)");
    } else if (model[0] && !qemu_has_cpu(model)) {
        vmm_add_misfit(out, "it knows no such CPU as in config/cpu_model (qemu-system-x86_64 -cpu "
                            "help lists them; empty it)");
    }
}

const struct vmm_ops qemu_ops = {
    .name = "qemu",
    .traits = VMM_CPU_MODEL,
    .templates = &qemu_template_ops,
    .check = qemu_check,
    .find_program = qemu_program_find,
    .add_misfits = qemu_add_misfits,
    .create = qemu_create,
    .adopt = qemu_adopt,
    .end_strays = qemu_end_strays,
    .save = qemu_save,
    .stop = qemu_stop,
    .pause = qemu_pause,
    .kill = qemu_kill,
    .endpoint = qemu_endpoint,
    .describe = qemu_describe,
    .release = qemu_release,
};
