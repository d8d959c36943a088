#include "vm/control.h"

#include <stdlib.h>
#include <string.h>

#include "ssh/ssh.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/random.h"
#include "vm/machine.h"
#include "vm/orphans.h"
#include "vm/target.h"
#include "vm/vm.h"

/* The resident shell. Requests are written to its input one behind the other, without waiting; the
 * answers come in the same order, each ended by a marker with the nonce of its request. */

/* After a refused or lost connection, the wait before the next. A guest that has the network up but
 * no SSH server yet refuses at once, so while it boots the pace decides how early it is found. */
#define CONTROL_RETRY_MS 50
#define CONTROL_RETRY_MOST_MS 1000
#define CONTROL_LATER_MS 2000       /* for somebody who will be called before */
#define CONTROL_DENIED_MOST_MS 8000 /* for a machine of others, who may count what they refuse */

/* The most that an answer may hold: the variables, quoted, and some more. */
#define CONTROL_ANSWER_LIMIT (GUEST_ENV_LIMIT + (1 << 20))

struct control_request {
    struct list link;
    char nonce[NONCE_LENGTH + 1];
    control_done *done;
    void *arg;
    uint64_t deadline; /* of uv_now() */
};

struct control {
    struct vm *vm;               /* the owner */
    struct ssh_session *session; /* NULL between two attempts */
    struct ssh_channel *shell;
    bool started, up;
    bool held;
    bool trusted;      /* the host key of this attempt was accepted */
    unsigned retry;    /* ms */
    uv_timer_t *timer; /* retry while there is no session, deadline of the first request while there
                          is one */
    struct list requests;
    struct buf answer;
    size_t searched; /* bytes of it that hold no part of a marker */
};

static void control_connect(struct control *control);
static void control_lost(struct control *control, int status, const char *why);

struct control *control_new(struct vm *vm) {
    struct control *control = calloc(1, sizeof *control);
    if (!control)
        return NULL;
    control->timer = malloc(sizeof *control->timer);
    if (!control->timer) {
        free(control);
        return NULL;
    }
    uv_timer_init(vm->daemon->loop, control->timer);
    control->timer->data = control;
    control->vm = vm;
    list_init(&control->requests);
    return control;
}

void control_free(struct control *control) {
    if (!control)
        return;
    control_stop(control, -ERR_GONE);
    uv_close((uv_handle_t *)control->timer, (uv_close_cb)free);
    buf_free(&control->answer);
    free(control);
}

static void control_retry(uv_timer_t *timer) {
    control_connect(timer->data);
}

static void control_overdue(uv_timer_t *timer) {
    struct control *control = timer->data;
    cleanup_buf struct buf why = {0};
    buf_printf(&why, "the guest has not answered for %u ms", control->vm->daemon->settings.timeout);
    control_lost(control, -ERR_TIMED_OUT, why.failed ? "" : why.data);
}

/* The timer follows the first request, whose deadline is the earliest. */
static void control_watch(struct control *control) {
    if (!control->session)
        return; /* the timer is that of the next attempt */
    if (list_is_empty(&control->requests) || control->held) {
        uv_timer_stop(control->timer);
        return;
    }
    struct control_request *first =
        LIST_OWNER(control->requests.next, struct control_request, link);
    uint64_t now = uv_now(control->vm->daemon->loop);
    uv_timer_start(control->timer, control_overdue,
                   first->deadline > now ? first->deadline - now : 1, 0);
}

static void control_fail_requests(struct control *control, int status) {
    struct list failed, *link;
    list_init(&failed);
    list_splice(&failed, &control->requests);
    while ((link = list_pop(&failed))) {
        struct control_request *request = LIST_OWNER(link, struct control_request, link);
        request->done(request->arg, status, "", 0);
        free(request);
    }
}

static void control_disconnect(struct control *control) {
    uv_timer_stop(control->timer);
    if (control->shell)
        ssh_channel_close(control->shell);
    if (control->session)
        ssh_session_close(control->session);
    control->shell = NULL;
    control->session = NULL;
    control->up = control->trusted = false;
    if (control->answer.data)
        explicit_bzero(control->answer.data, control->answer.len);
    buf_free(&control->answer);
    control->searched = 0;
}

static unsigned control_retry_most(const struct control *control, int status) {
    if (machine_is_existing(control->vm))
        return status == -ERR_DENIED ? CONTROL_DENIED_MOST_MS : CONTROL_RETRY_MOST_MS;
    return control->vm->state == VM_BOOTING ? CONTROL_RETRY_MS : CONTROL_RETRY_MOST_MS;
}

static void control_lost(struct control *control, int status, const char *why) {
    bool was_up = control->up, trusted = control->trusted;
    control_disconnect(control);
    if (control->started) {
        unsigned most = control_retry_most(control, status);
        if (status == -ERR_DENIED && control->retry < CONTROL_RETRY_MOST_MS)
            control->retry = CONTROL_RETRY_MOST_MS; /* will not get better by itself */
        uv_timer_start(control->timer, control_retry, control->retry, 0);
        control->retry *= 2;
        if (control->retry > most)
            control->retry = most;
    }
    if (was_up)
        vm_guest_lost(control->vm, status, why);
    else
        machine_no_answer(control->vm, status, trusted, why);
    control_fail_requests(control, status);
}

/* Takes complete answers out of what has come. */
static void control_answers(struct control *control) {
    while (!list_is_empty(&control->requests) && control->answer.len) {
        struct control_request *request =
            LIST_OWNER(control->requests.next, struct control_request, link);
        size_t before, after;
        int status;
        if (!guest_marker_find(control->answer.data + control->searched,
                               control->answer.len - control->searched, request->nonce, &before,
                               &after, &status)) {
            control->searched += before;
            break;
        }
        before += control->searched;
        after += control->searched;
        control->searched = 0;
        list_remove(&request->link);
        struct buf answer = control->answer; /* the callback may end the connection */
        control->answer = (struct buf){0};
        buf_append(&control->answer, answer.data + after, answer.len - after);
        control_watch(control);
        request->done(request->arg, status, answer.data, before);
        free(request);
        explicit_bzero(answer.data, answer.len);
        buf_free(&answer);
    }
}

static void control_hello(void *arg, int status, const char *output, size_t length) {
    struct control *control = arg;
    if (status < 0)
        return; /* told by control_lost(), too */
    control->vm->guest->control_facts(output, length, &control->vm->facts);
    orphans_meet(control->vm->orphans);
    control->up = true;
    control->retry = CONTROL_RETRY_MS;
    vm_guest_up(control->vm);
}

static void control_data(void *arg, int stream, const char *data, size_t length) {
    struct control *control = arg;
    if (stream != 1)
        return;
    buf_append(&control->answer, data, length);
    if (control->answer.failed || control->answer.len > CONTROL_ANSWER_LIMIT ||
        list_is_empty(&control->requests)) {
        control_lost(control, -ERR_UNREACHABLE, "the guest's shell says what it was not asked");
        return;
    }
    control_answers(control);
}

static void control_closed(void *arg, const struct ssh_exit *exit) {
    control_lost(arg,
                 exit->end == SSH_REFUSED || exit->end == SSH_LOST ? exit->error : -ERR_UNREACHABLE,
                 exit->why ? exit->why : "the guest's shell has ended");
}

static void control_up(void *arg) {
    static const struct ssh_channel_events events = {.data = control_data,
                                                     .closed = control_closed};
    struct control *control = arg;
    cleanup_buf struct buf command = {0}, hello = {0};
    control->vm->guest->control_shell(&command);
    control->vm->guest->control_hello(&hello, &control->vm->facts);
    int r = command.failed ? -ERR_NO_MEMORY
                           : ssh_channel_exec(control->session, command.data, &events, control,
                                              &control->shell);
    if (r == 0)
        r = control_request(control, &hello, control_hello, control);
    if (r < 0)
        control_lost(control, r, error_text(r));
}

static void control_down(void *arg, int status, const char *why) {
    control_lost(arg, status, why);
}

static void control_trusted(void *arg, const char *key, size_t length) {
    struct control *control = arg;
    control->trusted = true;
    machine_trust(control->vm, key, length);
}

static void control_connect(struct control *control) {
    static const struct ssh_session_events events = {
        .trusted = control_trusted, .up = control_up, .down = control_down};
    struct ssh_target target;
    int r = vm_target(control->vm, &target) ? ssh_session_open(control->vm->daemon->loop, &target,
                                                               &events, control, &control->session)
                                            : -ERR_UNREACHABLE;
    if (r < 0)
        control_lost(control, r, error_text(r));
}

void control_start(struct control *control, bool later) {
    if (control->started)
        return;
    control->started = true;
    control->retry = CONTROL_RETRY_MS;
    if (later)
        uv_timer_start(control->timer, control_retry, CONTROL_LATER_MS, 0);
    else
        control_connect(control);
}

void control_hurry(struct control *control) {
    if (!control->started || control->up || control->shell)
        return;
    control_disconnect(control);
    control_connect(control);
}

void control_again(struct control *control) {
    control->retry = CONTROL_RETRY_MOST_MS;
    control->up = false; /* the loss is no news */
    control_lost(control, -ERR_UNREACHABLE, "the variables could not be brought together");
}

bool control_is_up(const struct control *control) {
    return control->up;
}

void control_hold(struct control *control, bool hold) {
    if (control->held == hold)
        return;
    control->held = hold;
    if (control->session)
        ssh_session_hold(control->session, hold);
    uint64_t deadline = uv_now(control->vm->daemon->loop) + control->vm->daemon->settings.timeout;
    for (struct list *l = control->requests.next; l != &control->requests; l = l->next)
        LIST_OWNER(l, struct control_request, link)->deadline = deadline;
    control_watch(control);
}

bool control_is_idle(const struct control *control) {
    return list_is_empty(&control->requests);
}

void control_stop(struct control *control, int status) {
    control->started = false;
    control_disconnect(control);
    control_fail_requests(control, status);
}

int control_request(struct control *control, const struct buf *script, control_done *done,
                    void *arg) {
    if (!control->shell)
        return -ERR_UNREACHABLE;
    struct control_request *request = calloc(1, sizeof *request);
    if (!request)
        return -ERR_NO_MEMORY;
    cleanup_buf struct buf line = {0};
    int r = random_nonce(request->nonce);
    control->vm->guest->control_request(&line, request->nonce, script->data, script->len);
    if (r == 0 && line.failed)
        r = -ERR_NO_MEMORY;
    if (r == 0) {
        ssize_t waiting = ssh_channel_write(control->shell, line.data, line.len);
        r = waiting < 0 ? (int)waiting : 0;
    }
    if (line.data)
        explicit_bzero(line.data, line.len);
    if (r < 0) {
        free(request);
        return r;
    }
    request->done = done;
    request->arg = arg;
    request->deadline = uv_now(control->vm->daemon->loop) + control->vm->daemon->settings.timeout;
    list_append(&control->requests, &request->link);
    if (control->requests.next == &request->link)
        control_watch(control);
    return 0;
}
