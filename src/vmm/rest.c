#include "vmm/rest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "util/cleanup.h"
#include "util/errors.h"
#include "util/log.h"
#include "vmm/event_log.h"
#include "vmm/host.h"
#include "vmm/http.h"
#include "vmm/process.h"

#define REST_START_MS 10000 /* until the guest's CPUs run */
#define REST_RETRY_MS 10    /* between looks for the socket of a VMM that has just been started */
#define REST_PRESS_MS 2000  /* between presses of the power button */
#define REST_CALL_MS 5000   /* an answer to anything else */

#define REST_MARGIN_MS 200
#define REST_CONSOLE_TAIL 4096 /* of the console, where a kernel's last words are looked for */

enum rest_stage {
    STAGE_STARTING,
    STAGE_RUNNING,
    STAGE_POWERDOWN, /* the guest was asked to power down */
    STAGE_QUIT,      /* the VMM was asked to quit */
    STAGE_KILLED,
    STAGE_EXITED,
};

struct rest {
    struct vmm vmm;
    const struct rest_dialect *dialect;
    uv_loop_t *loop;
    struct vmm_events events;
    void *arg;
    struct process *process;     /* owned; NULL until spawned */
    struct http *http;           /* owned */
    uv_timer_t deadline;         /* of the stage */
    uv_timer_t retry;            /* looks for the socket, or presses the power button, again */
    unsigned handles;            /* of these two, not yet closed */
    struct event_log *event_log; /* owned; NULL: this VMM notes none */
    enum rest_stage stage;
    bool adopted;
    bool booted; /* it has the machine, and the guest's CPUs were started */
    struct rest_plan plan;
    size_t step; /* of the plan: the next */
    unsigned quit_ms;
    bool pausing;     /* pause() is under way */
    bool pause_to;    /* what it was asked for last */
    bool pause_asked; /* and what the VMM was */
    vmm_paused *paused;
    char *socket, *vsock, *log, *console; /* owned; paths */
    char *event_path, *own_log;           /* owned; paths, or NULL */
    unsigned vsock_port;
    char killed_for[256];   /* why it had or will have to be killed; or empty */
    char killed_words[600]; /* and what it has said about that itself */
};

static struct rest *rest_of(const struct vmm *vmm) {
    return (struct rest *)(void *)vmm;
}

/* ---- the end ---- */

static void rest_on_handle_closed(uv_handle_t *handle) {
    struct rest *r = handle->data;
    if (--r->handles)
        return;
    rest_free_plan(&r->plan);
    free(r->socket);
    free(r->vsock);
    free(r->log);
    free(r->console);
    free(r->event_path);
    free(r->own_log);
    free(r);
}

void rest_release(struct vmm *vmm) {
    struct rest *r = rest_of(vmm);
    /* Without a machine in it nobody could adopt it: the next daemon boots anew. */
    if (r->process && r->stage != STAGE_EXITED && !r->booted)
        process_kill(r->process);
    http_close(r->http);
    process_release(r->process);
    uv_close((uv_handle_t *)&r->deadline, rest_on_handle_closed);
    uv_close((uv_handle_t *)&r->retry, rest_on_handle_closed);
    event_log_close(r->event_log);
}

static void rest_unlink(const struct rest *r) {
    cleanup_buf struct buf lock = {0};
    buf_printf(&lock, "%s.lock", r->socket); /* Cloud Hypervisor's, since 2026 */
    unlink(r->socket);
    unlink(r->vsock);
    if (!lock.failed)
        unlink(lock.data);
}

static bool rest_console_ends_with(const struct rest *r, const char *words) {
    char tail[REST_CONSOLE_TAIL];
    cleanup_close int fd = open(r->console, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    ssize_t n = size < 0 ? -1
                         : pread(fd, tail, sizeof tail,
                                 size > (off_t)sizeof tail ? size - (off_t)sizeof tail : 0);
    return n > 0 && memmem(tail, (size_t)n, words, strlen(words));
}

static void rest_on_exited(void *arg, const struct process_end *end) {
    struct rest *r = arg;
    const char *title = r->dialect->title;
    /* Neither of them says why it ends, but the guest's kernel does. The status alone would be
     * that of success also after a panic, and is not known of a child of another daemon. */
    bool panicked = rest_console_ends_with(r, "Kernel panic - ");
    bool in_order = r->stage != STAGE_KILLED && !panicked &&
                    (end->status == 0 || (r->adopted && rest_console_ends_with(r, "reboot: ")));
    cleanup_buf struct buf why = {0}, words = {0};
    if (r->stage == STAGE_KILLED && r->killed_for[0])
        buf_printf(&why, "%s, so %s was killed", r->killed_for, title);
    else
        buf_printf(&why, "%s ended (%s)%s", title, end->how,
                   panicked ? ": the guest's kernel has panicked" : "");
    if (r->stage == STAGE_KILLED)
        buf_append_str(&words, r->killed_words);
    if (!words.len)
        process_last_words(r->log, &words);
    if (!words.len && r->own_log)
        process_last_words(r->own_log, &words);

    r->stage = STAGE_EXITED;
    uv_timer_stop(&r->deadline);
    uv_timer_stop(&r->retry);
    event_log_close(r->event_log);
    r->event_log = NULL;
    http_close(r->http);
    r->http = NULL;
    rest_unlink(r);
    r->events.exited(r->arg, in_order ? VMM_POWERED_OFF : VMM_ENDED, why.failed ? title : why.data,
                     words.len && !words.failed ? words.data : "");
}

void rest_kill(struct vmm *vmm) {
    struct rest *r = rest_of(vmm);
    if (r->stage == STAGE_EXITED)
        return;
    r->stage = STAGE_KILLED;
    uv_timer_stop(&r->deadline);
    uv_timer_stop(&r->retry);
    process_kill(r->process);
}

static __attribute__((format(printf, 2, 3))) void rest_kill_for(struct rest *r, const char *format,
                                                                ...) {
    va_list args;
    if (r->stage >= STAGE_KILLED)
        return;
    va_start(args, format);
    vsnprintf(r->killed_for, sizeof r->killed_for, format, args);
    va_end(args);
    rest_kill(&r->vmm);
}

/* For an answer that is none. */
static void rest_kill_for_answer(struct rest *r, const char *why, const char *words) {
    snprintf(r->killed_words, sizeof r->killed_words, "%s", words);
    rest_kill_for(r, "%s", why);
}

/* ---- the start ---- */

static void rest_on_deadline(uv_timer_t *timer);

static void rest_set_deadline(struct rest *r, unsigned ms) {
    uv_update_time(r->loop); /* it counts from now, whatever this turn has done before */
    uv_timer_start(&r->deadline, rest_on_deadline, ms, 0);
}

/* A little less than the stage has, so that the request with no answer is named. */
static unsigned rest_time_left(const struct rest *r) {
    uint64_t left = uv_timer_get_due_in(&r->deadline);
    return left > REST_MARGIN_MS ? (unsigned)left - REST_MARGIN_MS : 1;
}

static void rest_call(struct rest *r, const struct rest_call *call, http_done *done) {
    json_t *body = call->body ? json_loads(call->body, 0, NULL) : NULL;
    if (http_request(r->http, call->method, call->path, body, REST_CALL_MS, done, r) < 0)
        log_error("%s %d: out of memory", r->dialect->title, (int)process_pid(r->process));
}

static void rest_become_ready(struct rest *r) {
    r->stage = STAGE_RUNNING;
    r->booted = true;
    r->killed_for[0] = '\0';
    rest_free_plan(&r->plan);
    uv_timer_stop(&r->deadline);
    uv_timer_stop(&r->retry);
    r->events.ready(r->arg);
}

static void rest_on_step(void *arg, int status, const json_t *answer, const char *why,
                         const char *words);

static void rest_next_step(struct rest *r) {
    if (r->step == r->plan.step_count) {
        rest_become_ready(r);
        return;
    }
    struct rest_step *step = &r->plan.steps[r->step++];
    json_t *body = step->body;
    step->body = NULL;
    if (http_request(r->http, step->method, step->path, body, rest_time_left(r), rest_on_step, r) <
        0)
        rest_kill_for(r, "out of memory");
}

static void rest_on_step(void *arg, int status, const json_t *answer, const char *why,
                         const char *words) {
    struct rest *r = arg;
    (void)answer;
    if (r->stage != STAGE_STARTING)
        return;
    if (status == 0)
        rest_next_step(r);
    else if (status == -ERR_UNREACHABLE) /* most likely it is about to end, with better words */
        snprintf(r->killed_for, sizeof r->killed_for, "%s", why), rest_set_deadline(r, 1000);
    else
        rest_kill_for_answer(r, why, words);
}

static void rest_look(uv_timer_t *timer);

static void rest_on_look(void *arg, int status, const json_t *answer, const char *why,
                         const char *words) {
    struct rest *r = arg;
    (void)answer;
    if (r->stage != STAGE_STARTING)
        return;
    if (status == 0 || r->adopted)
        log_debug("%s %d answers: %s", r->dialect->title, (int)process_pid(r->process), why);
    if (status == 0)
        rest_next_step(r);
    else if (status == -ERR_UNREACHABLE) {
        snprintf(r->killed_for, sizeof r->killed_for, "%s", why); /* should nothing better come */
        if (uv_timer_get_due_in(&r->deadline) > 2 * REST_MARGIN_MS)
            uv_timer_start(&r->retry, rest_look, REST_RETRY_MS, 0);
    } else if (!r->adopted)
        rest_kill_for_answer(r, why, words);
}

/* The socket is there when the VMM has made it. Any answer will do: Cloud Hypervisor has no state
 * while it has no machine. */
static void rest_look(uv_timer_t *timer) {
    struct rest *r = timer->data;
    const struct rest_call *call = &r->dialect->hello;
    if (http_request(r->http, call->method, call->path, NULL, rest_time_left(r), rest_on_look, r) <
        0)
        uv_timer_start(&r->retry, rest_look, REST_RETRY_MS, 0);
}

/* A VMM that starts the guest anew when it resets, where the host would have to put in what is
 * particular to the VM, is ended instead, as QEMU ends. */
static void rest_on_restarted(void *arg) {
    rest_kill_for(arg, "the guest has restarted, or its kernel has panicked");
}

static int rest_watch_events(struct rest *r) {
    return r->event_path ? event_log_open(r->loop, r->event_path, r->dialect->restarted,
                                          rest_on_restarted, r, &r->event_log)
                         : 0;
}

/* ---- stopping ---- */

static void rest_on_quit(void *arg, int status, const json_t *answer, const char *why,
                         const char *words) {
    struct rest *r = arg;
    cleanup_buf struct buf text = {0};
    (void)answer;
    buf_printf(&text, "%s could not be told to quit: %s", r->dialect->title, why);
    if (status < 0 && status != -ERR_UNREACHABLE && r->stage == STAGE_QUIT)
        rest_kill_for_answer(r, text.failed ? "" : text.data, words);
}

static void rest_quit(struct rest *r) {
    uv_timer_stop(&r->retry);
    if (!r->dialect->quit.method) {
        rest_kill_for(r, "the guest has not powered down in time");
        return;
    }
    r->stage = STAGE_QUIT;
    r->killed_for[0] = '\0';
    rest_set_deadline(r, r->quit_ms);
    rest_call(r, &r->dialect->quit, rest_on_quit);
}

/* Again and again: a guest that still boots loses the first ones. A paused guest sees none. */
static void rest_press_power(uv_timer_t *timer) {
    struct rest *r = timer->data;
    if (r->stage != STAGE_POWERDOWN)
        return;
    uv_timer_start(timer, rest_press_power, REST_PRESS_MS, 0);
    rest_call(r, &r->dialect->power_button, NULL);
}

static void rest_on_state_at_stop(void *arg, int status, const json_t *answer, const char *why,
                                  const char *words) {
    struct rest *r = arg;
    const char *state = json_string_value(json_object_get(answer, "state"));
    (void)why, (void)words;
    if (r->stage != STAGE_POWERDOWN)
        return;
    if (status == 0 && state && strcmp(state, "Paused") == 0)
        rest_call(r, &r->dialect->resume, NULL);
    rest_press_power(&r->retry);
}

void rest_stop(struct vmm *vmm, unsigned powerdown_ms, unsigned quit_ms) {
    struct rest *r = rest_of(vmm);
    if (r->stage >= STAGE_KILLED)
        return;
    bool again = r->stage >= STAGE_POWERDOWN;
    r->quit_ms = quit_ms;
    r->killed_for[0] = '\0';
    /* Again: more haste is granted, more time is not. */
    unsigned left = again ? (unsigned)uv_timer_get_due_in(&r->deadline) : UINT32_MAX;
    unsigned wanted = r->stage == STAGE_QUIT ? quit_ms : powerdown_ms;
    bool booted = r->booted;
    rest_set_deadline(r, wanted < left ? wanted : left);
    if (r->stage == STAGE_QUIT)
        return;
    if (!powerdown_ms || !booted) {
        rest_quit(r);
        return;
    }
    if (again)
        return;
    r->stage = STAGE_POWERDOWN;
    uv_timer_stop(&r->retry);
    rest_call(r, &r->dialect->state, rest_on_state_at_stop);
}

static void rest_on_deadline(uv_timer_t *timer) {
    struct rest *r = timer->data;
    switch (r->stage) {
    case STAGE_STARTING:
        if (r->adopted) {
            /* The guest may be as reachable as before: no reason to end it. */
            log_warn("%s %d does not answer on %s; going on without", r->dialect->title,
                     (int)process_pid(r->process), r->socket);
            rest_become_ready(r);
        } else {
            rest_kill(&r->vmm); /* for what was said last */
        }
        break;
    case STAGE_POWERDOWN:
        rest_quit(r);
        break;
    case STAGE_QUIT:
        rest_kill_for(r, "%s did not quit within %u ms", r->dialect->title, r->quit_ms);
        break;
    default:
        break;
    }
}

/* ---- pausing ---- */

static void rest_on_state(void *arg, int status, const json_t *answer, const char *why,
                          const char *words);

static void rest_end_pause(struct rest *r, int status, const char *why, const char *words) {
    vmm_paused *done = r->paused;
    r->paused = NULL;
    r->pausing = false;
    if (done && r->stage == STAGE_RUNNING)
        done(r->arg, status, why, words);
}

static void rest_on_paused(void *arg, int status, const json_t *answer, const char *why,
                           const char *words) {
    struct rest *r = arg;
    (void)answer;
    if (status == 0 && r->pause_to != r->pause_asked) /* somebody has thought otherwise meanwhile */
        rest_call(r, &r->dialect->state, rest_on_state);
    else
        rest_end_pause(r, status, why, words);
}

/* What is so already is an error to Cloud Hypervisor: so the state is looked at first. */
static void rest_on_state(void *arg, int status, const json_t *answer, const char *why,
                          const char *words) {
    struct rest *r = arg;
    const char *state = json_string_value(json_object_get(answer, "state"));
    r->pause_asked = r->pause_to;
    if (status < 0 || !state)
        rest_end_pause(r, status < 0 ? status : -ERR_IO, status < 0 ? why : "it has no state",
                       words);
    else if ((strcmp(state, "Paused") == 0) == r->pause_to)
        rest_end_pause(r, 0, "", "");
    else
        rest_call(r, r->pause_to ? &r->dialect->pause : &r->dialect->resume, rest_on_paused);
}

void rest_pause(struct vmm *vmm, bool paused, vmm_paused *done) {
    struct rest *r = rest_of(vmm);
    r->paused = done;
    r->pause_to = paused;
    if (!r->pausing)
        rest_call(r, &r->dialect->state, rest_on_state);
    r->pausing = true;
}

/* ---- create and adopt ---- */

static int rest_new(const struct rest_dialect *dialect, uv_loop_t *loop,
                    const struct vmm_config *config, const char *socket,
                    const struct vmm_events *events, void *arg, struct rest **ret_rest) {
    struct rest *r = calloc(1, sizeof *r);
    if (!r)
        return -ERR_NO_MEMORY;
    *r = (struct rest){
        .vmm.ops = dialect->ops,
        .dialect = dialect,
        .loop = loop,
        .events = *events,
        .arg = arg,
        .handles = 2,
        .vsock_port = config->vsock_port,
        .socket = strdup(socket),
        .log = host_join(config->dir, "vmm.log"),
        .console = host_join(config->dir, "serial.log"),
        .event_path = dialect->event_log ? host_join(config->dir, dialect->event_log) : NULL,
        .own_log = dialect->own_log ? host_join(config->dir, dialect->own_log) : NULL,
    };
    uv_timer_init(loop, &r->deadline); /* these cannot fail */
    uv_timer_init(loop, &r->retry);
    r->deadline.data = r->retry.data = r;
    int status = asprintf(&r->vsock, "%s.vsock", socket) < 0 ? -ERR_NO_MEMORY : 0;
    if (status < 0)
        r->vsock = NULL;
    else if (strlen(r->vsock) >= sizeof((struct sockaddr_un *)NULL)->sun_path)
        status = -ERR_NAME_TOO_LONG;
    if (status == 0 && (!r->socket || !r->log || !r->console))
        status = -ERR_NO_MEMORY;
    if (status == 0)
        status = http_open(loop, r->socket, &r->http);
    if (status == -ERR_NAME_TOO_LONG)
        log_error("%s: the path of a socket has 107 bytes at most, this has %zu", r->vsock,
                  strlen(r->vsock));
    if (status < 0) {
        rest_release(&r->vmm);
        return status;
    }
    *ret_rest = r;
    return 0;
}

/* A file that the VMM would make for all to read, or expects to be there. */
static int rest_make_file(const char *path) {
    cleanup_close int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    return fd < 0 ? -errno : 0;
}

static int rest_spawn(struct rest *r, const struct vmm_config *config) {
    cleanup_free char *home = NULL, *temporary = NULL;
    if (asprintf(&home, "HOME=%s", config->dir) < 0 ||
        asprintf(&temporary, "TMPDIR=%s", config->dir) < 0)
        return -ERR_NO_MEMORY;
    char *env[] = {(char[]){"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, (char[]){"LC_ALL=C"}, home,
                   temporary, NULL};
    struct process_options options = {
        .program = r->plan.arguments[0],
        .argv = r->plan.arguments,
        .env = env,
        .log = r->log,
        .output = r->console,
        .fds = {-1, -1},
        .transient = config->transient,
    };
    int status = process_spawn(r->loop, &options, rest_on_exited, r, &r->process);
    if (status == 0)
        http_set_peer(r->http, process_pid(r->process));
    return status;
}

int rest_create(const struct rest_dialect *dialect, uv_loop_t *loop,
                const struct vmm_config *config, const struct vmm_events *events, void *arg,
                struct vmm **ret_vmm) {
    struct rest *r;
    int status = rest_new(dialect, loop, config, config->socket, events, arg, &r);
    if (status < 0)
        return status;
    rest_unlink(r); /* what an earlier boot left */
    status = dialect->plan(config, r->vsock, &r->plan);
    if (status == 0)
        status = r->plan.failed;
    if (status == 0 && r->own_log)
        status = rest_make_file(r->own_log);
    if (status == 0 && r->event_path)
        status = rest_make_file(r->event_path);
    if (status == 0)
        status = rest_watch_events(r);
    if (status == 0) /* comes last: there is nothing to take back behind it */
        status = rest_spawn(r, config);
    if (status < 0) {
        rest_release(&r->vmm);
        return status;
    }
    rest_set_deadline(r, REST_START_MS);
    uv_timer_start(&r->retry, rest_look, 1, 0);
    *ret_vmm = &r->vmm;
    return 0;
}

int rest_adopt(const struct rest_dialect *dialect, uv_loop_t *loop, const struct vmm_config *config,
               const json_t *saved, const struct vmm_events *events, void *arg,
               struct vmm **ret_vmm) {
    struct rest *r;
    const char *socket = json_string_value(json_object_get(saved, "socket"));
    if (!socket)
        return -ERR_INVALID;
    int status = rest_new(dialect, loop, config, socket, events, arg, &r);
    if (status < 0)
        return status;
    r->adopted = r->booted = true;
    r->vsock_port = (unsigned)json_integer_value(json_object_get(saved, "vsock_port"));
    status = process_adopt(loop, saved, rest_on_exited, r, &r->process);
    if (status == 0)
        http_set_peer(r->http, process_pid(r->process));
    if (status == -ESRCH)
        rest_unlink(r);
    if (status == 0)
        status = rest_watch_events(r);
    if (status < 0) {
        rest_release(&r->vmm);
        return status;
    }
    rest_set_deadline(r, REST_START_MS);
    rest_look(&r->retry);
    *ret_vmm = &r->vmm;
    return 0;
}

json_t *rest_save(const struct vmm *vmm) {
    const struct rest *r = rest_of(vmm);
    if (r->stage == STAGE_EXITED || !r->booted)
        return NULL;
    json_t *saved = json_pack("{s:s, s:i}", "socket", r->socket, "vsock_port", (int)r->vsock_port);
    if (saved && process_save(r->process, saved) < 0) {
        json_decref(saved);
        saved = NULL;
    }
    return saved;
}

bool rest_endpoint(const struct vmm *vmm, struct vmm_endpoint *ret_endpoint) {
    const struct rest *r = rest_of(vmm);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!r->booted || r->stage == STAGE_EXITED)
        return false;
    memcpy(address.sun_path, r->vsock, strlen(r->vsock)); /* rest_new() has looked at its length */
    *ret_endpoint = (struct vmm_endpoint){
        .length = sizeof address, .vsock_port = r->vsock_port, .peer = process_pid(r->process)};
    memcpy(&ret_endpoint->address, &address, sizeof address);
    return true;
}

void rest_describe(const struct vmm *vmm, json_t *info) {
    const struct rest *r = rest_of(vmm);
    json_object_set_new(info, "accelerator", json_string("kvm"));
    if (r->stage == STAGE_EXITED)
        return;
    json_object_set_new(info, "pid", json_integer(process_pid(r->process)));
    if (!r->booted)
        return;
    json_object_set_new(info, "vsock_socket", json_string(r->vsock));
    json_object_set_new(info, "vsock_port", json_integer(r->vsock_port));
}
