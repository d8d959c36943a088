#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#include "ssh/internal.h"
#include "util/errors.h"
#include "util/log.h"

static void session_pump(struct ssh_session *session, bool readable);
static void session_on_timer(uv_timer_t *handle);

/* A sign of life is a round trip: a thousand sessions together ask for no more than 50 a second. */
#define SESSION_SHARE_MS 20

#define SESSION_CONNECT_AGAIN_MS 20 /* between tries to connect to one that is slow to accept */

static unsigned session_count;

/* How long a server may be silent before it is asked, ms. */
static uint64_t session_patience(const struct ssh_session *session) {
    uint64_t least = session->target.timeout / 3, fair = (uint64_t)session_count * SESSION_SHARE_MS;
    return fair > least ? fair : least;
}

/* Where the server is, for a sentence. */
static void session_print_address(const struct ssh_session *session, char *text, size_t size) {
    const struct sockaddr *address = (const struct sockaddr *)&session->target.address;
    char host[64], port[16];
    if (address->sa_family == AF_UNIX)
        snprintf(text, size, "%s", ((const struct sockaddr_un *)(const void *)address)->sun_path);
    else if (getnameinfo(address, session->target.address_length, host, sizeof host, port,
                         sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) == 0)
        snprintf(text, size, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    else
        snprintf(text, size, "an unknown address");
}

static void session_free(struct ssh_session *session) {
    free((char *)session->target.user);
    free((char *)session->target.key_path);
    free((uint8_t *)session->target.host_key);
    free(session);
}

static void session_on_handle_closed(uv_handle_t *handle) {
    struct ssh_session *session = handle->data;
    if (--session->uv.open == 0)
        session_free(session);
}

/* A libssh2 call that is under way has state that only its own error path frees. */
static void session_resume_dead(void *arg) {
    struct ssh_session *session = arg;
    struct transport *t = &session->transport;
    if (session->state == SESSION_HANDSHAKE)
        libssh2_session_handshake(t->ssh, t->fd);
    else if (session->state == SESSION_AUTHENTICATING)
        libssh2_userauth_publickey_fromfile_ex(t->ssh, session->target.user,
                                               (unsigned)strlen(session->target.user), NULL,
                                               session->target.key_path, NULL);
    else if (session->state == SESSION_UP && list_is_empty(&t->wires))
        libssh2_channel_open_ex(t->ssh, "ping@vmsfs", 10, 0, 0, NULL, 0);
}

static void session_disconnect(struct ssh_session *session) {
    /* Before close(): libuv takes the number from epoll, which may by then be another's socket. */
    if (!uv_is_closing((uv_handle_t *)&session->uv.poll))
        uv_close((uv_handle_t *)&session->uv.poll, session_on_handle_closed);
    uv_timer_stop(&session->uv.timer);
    uv_idle_stop(&session->uv.idle);
    transport_free(&session->transport, session_resume_dead, session);
    session->state = SESSION_DOWN;
}

static void session_destroy(struct ssh_session *session) {
    session_count--;
    session_disconnect(session);
    struct list *l;
    list_splice(&session->channels, &session->queued);
    while ((l = list_pop(&session->channels))) {
        struct ssh_channel *channel = LIST_OWNER(l, struct ssh_channel, link);
        channel->session = NULL;
        channel_free(channel);
    }
    uv_close((uv_handle_t *)&session->uv.timer, session_on_handle_closed);
    uv_close((uv_handle_t *)&session->uv.idle, session_on_handle_closed);
}

/* Ends the session for the owner: closed() for each channel, then down(). */
static __attribute__((format(printf, 3, 4))) void
session_fail(struct ssh_session *session, int status, const char *format, ...) {
    char address[128];
    struct buf why = {0};
    session_print_address(session, address, sizeof address);
    buf_printf(&why, "SSH to %s@%s: ", session->target.user, address);
    va_list args;
    va_start(args, format);
    buf_vprintf(&why, format, args);
    va_end(args);
    const char *text = why.failed ? "out of memory" : why.data;

    struct list lost, *l;
    list_init(&lost);
    list_splice(&lost, &session->channels);
    list_splice(&lost, &session->queued);
    while (!session->gone && (l = list_pop(&lost))) {
        struct ssh_channel *channel = LIST_OWNER(l, struct ssh_channel, link);
        if (channel->state != CHANNEL_QUEUED || !channel->pool || !pool_takes_lost(channel))
            channel_lose(channel, status, text);
    }
    list_splice(&session->channels, &lost); /* if gone: session_destroy() frees them */
    session_disconnect(session);
    if (!session->gone)
        session->events.down(session->arg, status, text);
    buf_free(&why);
}

static const char *session_attempt(const struct ssh_session *session) {
    switch (session->state) {
    case SESSION_CONNECTING:
        return "connecting";
    case SESSION_ASKING:
        return "asking for the guest";
    case SESSION_HANDSHAKE:
        return session->transport.heard ? "exchanging keys" : "waiting for the SSH server to speak";
    case SESSION_AUTHENTICATING:
        return "authenticating";
    case SESSION_UP:
    case SESSION_DOWN:
        break;
    }
    return "talking to it";
}

static void session_fail_transport(struct ssh_session *session) {
    session_fail(session, -ERR_UNREACHABLE, "%s failed: %s", session_attempt(session),
                 transport_error(&session->transport));
}

static bool session_check_host_key(struct ssh_session *session) {
    size_t length = 0;
    int type;
    const char *key = libssh2_session_hostkey(session->transport.ssh, &length, &type);
    if (!key || (session->target.host_key_length > 0 &&
                 (length != session->target.host_key_length ||
                  memcmp(key, session->target.host_key, length) != 0)))
        return false;
    session->state = SESSION_AUTHENTICATING;
    if (session->events.trusted)
        session->events.trusted(session->arg, key, length);
    return true;
}

static void session_ask(struct ssh_session *session) {
    int rc = transport_hear(&session->transport);
    if (rc == 0)
        session->state = SESSION_HANDSHAKE;
    else if (rc != -EAGAIN)
        session_fail(session, -ERR_UNREACHABLE, "the guest does not answer at port %u of its vsock",
                     session->target.vsock_port);
}

static void session_handshake(struct ssh_session *session) {
    struct transport *t = &session->transport;
    int rc = libssh2_session_handshake(t->ssh, t->fd);
    if (rc == LIBSSH2_ERROR_EAGAIN)
        return;
    if (rc == LIBSSH2_ERROR_KEY_EXCHANGE_FAILURE || rc == LIBSSH2_ERROR_KEX_FAILURE ||
        rc == LIBSSH2_ERROR_HOSTKEY_INIT || rc == LIBSSH2_ERROR_HOSTKEY_SIGN) {
        /* A server without a key of the demanded type ends here. */
        session_fail(session, -ERR_DENIED,
                     "no key exchange with the host key this VM was given is possible: %s",
                     transport_error(t));
        return;
    }
    if (rc < 0) {
        session_fail_transport(session);
        return;
    }
    if (!session_check_host_key(session))
        session_fail(session, -ERR_DENIED,
                     "the server's host key is not the one this VM was given: this is another "
                     "machine, or its host key was replaced");
}

static void session_authenticate(struct ssh_session *session) {
    struct transport *t = &session->transport;
    const char *key_path = session->target.key_path;
    int rc = libssh2_userauth_publickey_fromfile_ex(
        t->ssh, session->target.user, (unsigned)strlen(session->target.user), NULL, key_path, NULL);
    if (rc == LIBSSH2_ERROR_EAGAIN)
        return;
    if (rc == LIBSSH2_ERROR_SOCKET_SEND || rc == LIBSSH2_ERROR_SOCKET_RECV ||
        rc == LIBSSH2_ERROR_SOCKET_DISCONNECT || (rc < 0 && t->error)) {
        session_fail_transport(session);
        return;
    }
    if (rc < 0) {
        session_fail(session, -ERR_DENIED, "authenticating with the key %s was refused: %s",
                     key_path, transport_error(t));
        return;
    }
    t->allowance = 0;
    session->state = SESSION_UP;
    session->again = true;
    uv_timer_start(&session->uv.timer, session->uv.timer.timer_cb, session_patience(session), 0);
    session->events.up(session->arg);
}

static void session_add_wire(struct ssh_session *session, LIBSSH2_CHANNEL *raw) {
    struct transport *t = &session->transport;
    struct wire *wire = calloc(1, sizeof *wire);
    if (!wire) {
        t->broken = LIBSSH2_ERROR_ALLOC;
        return;
    }
    wire->raw = raw;
    wire->id = t->newest_id;
    wire->id_known = t->newest_known;
    list_append(&t->wires, &wire->link);
    session->gave_channel = true;
    if (list_is_empty(&session->queued))
        wire->closing = true; /* its owner has closed it meanwhile */
    else
        channel_start(LIST_OWNER(session->queued.next, struct ssh_channel, link), wire);
}

/* The server gave no channel (RFC 4254, 5.1): the one who waits longest bears it. */
static void session_refuse_channel(struct ssh_session *session) {
    if (list_is_empty(&session->queued))
        return;
    struct ssh_channel *channel = LIST_OWNER(session->queued.next, struct ssh_channel, link);
    char address[128], why[256];
    if (channel->pool && pool_takes_refused(channel))
        return;
    session_print_address(session, address, sizeof address);
    snprintf(why, sizeof why, "SSH to %s@%s: the server opens no further channel: %s",
             session->target.user, address, transport_error(&session->transport));
    channel_end(channel,
                &(struct ssh_exit){.end = SSH_REFUSED, .error = -ERR_UNREACHABLE, .why = why});
}

/* Begins or goes on with the channel open that is under way. A probe asks for a channel of a type
 * that no server has: every server answers that (RFC 4254, 5.1). libssh2_keepalive_send() will not
 * do, as libssh2 1.10 keeps the answers for ever, and reads none without a channel. */
static void session_step_opening(struct ssh_session *session) {
    struct transport *t = &session->transport;
    bool probe = session->opening == OPENING_PROBE;
    const char *type = probe ? "ping@vmsfs" : "session";
    t->newest_known = false;
    LIBSSH2_CHANNEL *raw =
        libssh2_channel_open_ex(t->ssh, type, (unsigned)strlen(type), CHANNEL_WINDOW,
                                LIBSSH2_CHANNEL_PACKET_DEFAULT, NULL, 0);
    int rc = raw ? 0 : libssh2_session_last_errno(t->ssh);
    if (rc == LIBSSH2_ERROR_EAGAIN)
        return;
    session->opening = OPENING_NOTHING;
    if (raw)
        session_add_wire(session, raw);
    else if (rc != LIBSSH2_ERROR_CHANNEL_FAILURE)
        t->broken = rc;
    else if (!probe)
        session_refuse_channel(session);
}

static void session_start_opening(struct ssh_session *session) {
    if (session->opening != OPENING_NOTHING || session->transport.broken)
        return;
    if (!list_is_empty(&session->queued))
        session->opening = OPENING_CHANNEL;
    else if (session->probe_wanted)
        session->opening = OPENING_PROBE;
    session->probe_wanted = false;
    if (session->opening != OPENING_NOTHING)
        session_step_opening(session);
}

/* Reads what has come, into libssh2's queues. Waiting for the end of any channel that has not ended
 * reads packets for all of them. libssh2_channel_read() would too, but may adjust the window, which
 * is forbidden after our CLOSE. Without a channel no call in libssh2 only reads; one that opens a
 * channel reads too. */
static void session_receive(struct ssh_session *session) {
    struct transport *t = &session->transport;
    t->allowance = SESSION_RECEIVE_MAX;
    if (list_is_empty(&t->wires)) {
        if (session->opening != OPENING_NOTHING) {
            session_step_opening(session);
        } else {
            session->probe_wanted = true;
            session_start_opening(session);
        }
    }
    int rc = 0;
    for (struct list *l = t->wires.next; rc == 0 && l != &t->wires; l = l->next) {
        LIBSSH2_CHANNEL *raw = LIST_OWNER(l, struct wire, link)->raw;
        rc = libssh2_channel_wait_eof(raw);
        if (rc == 0)
            rc = libssh2_channel_wait_closed(raw);
    }
    if (rc < 0 && rc != LIBSSH2_ERROR_EAGAIN)
        t->broken = rc;
    t->allowance = 0;
}

/* Frees the channels that both sides have closed. */
static void session_reap_wires(struct ssh_session *session) {
    struct list wires, *l;
    list_init(&wires);
    list_splice(&wires, &session->transport.wires);
    while ((l = list_pop(&wires))) {
        struct wire *wire = LIST_OWNER(l, struct wire, link);
        list_append(&session->transport.wires, l);
        if (!wire->closing || libssh2_channel_free(wire->raw) == LIBSSH2_ERROR_EAGAIN)
            continue;
        list_remove(&wire->link);
        free(wire);
        if (session->member)
            pool_has_room(session->member);
    }
}

static void session_pump_channels(struct ssh_session *session) {
    struct list work, *l;
    list_init(&work);
    list_splice(&work, &session->channels);
    while ((l = list_pop(&work))) {
        list_append(&session->channels, l);
        if (!session->gone && !session->transport.broken)
            channel_pump(LIST_OWNER(l, struct ssh_channel, link));
    }
}

static void session_run(struct ssh_session *session, bool readable) {
    struct transport *t = &session->transport;
    if (readable && !t->error)
        session_receive(session);
    if (session->opening != OPENING_NOTHING && !t->broken)
        session_step_opening(session);
    session_pump_channels(session);
    if (session->gone)
        return;
    if (!t->broken)
        session_reap_wires(session);
    session_start_opening(session);
    transport_flush(t);
    if (t->broken || (t->error && !session->again))
        session_fail(session, -ERR_UNREACHABLE, "the connection was lost: %s", transport_error(t));
}

static void session_on_poll(uv_poll_t *handle, int status, int events) {
    struct ssh_session *session = handle->data;
    if (session->state == SESSION_CONNECTING) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(session->transport.fd, SOL_SOCKET, SO_ERROR, &error, &length);
        session->transport.error = error;
        if (!error)
            session->state = session->target.vsock_port ? SESSION_ASKING : SESSION_HANDSHAKE;
        if (session->state == SESSION_ASKING)
            transport_ask(&session->transport, session->target.vsock_port);
    }
    if (status < 0)
        session->uv.poll_events =
            0; /* libuv makes an error of the socket EBADF and stops polling */
    if (events & UV_WRITABLE)
        transport_flush(&session->transport);
    session_pump(session, (events & UV_READABLE) || status < 0);
}

static void session_on_idle(uv_idle_t *handle) {
    uv_idle_stop(handle);
    session_pump(handle->data, false);
}

/* Leaves a callback of the loop: frees a session closed meanwhile, else waits for what it needs. */
static void session_leave(struct ssh_session *session) {
    session->busy = false;
    if (session->gone) {
        session_destroy(session);
        return;
    }
    if (session->state == SESSION_DOWN)
        return;
    transport_flush(&session->transport);
    if (session->again || session->transport.error)
        session_schedule(session);
    bool writes = session->state == SESSION_CONNECTING || transport_has_output(&session->transport);
    int wanted =
        (session->state == SESSION_CONNECTING ? 0 : UV_READABLE) | (writes ? UV_WRITABLE : 0);
    if (session->transport.error || session->transport.crowded)
        wanted = 0; /* level-triggered: it would be reported without end */
    if (wanted == session->uv.poll_events)
        return;
    session->uv.poll_events = wanted;
    if (!wanted)
        uv_poll_stop(&session->uv.poll);
    else
        uv_poll_start(&session->uv.poll, wanted, session_on_poll);
}

static void session_pump(struct ssh_session *session, bool readable) {
    bool silent = session->transport.heard == 0;
    session->busy = true;
    session->again = false;
    if (session->state == SESSION_CONNECTING && session->transport.error)
        session_fail_transport(session);
    if (session->state == SESSION_ASKING)
        session_ask(session);
    if (session->state == SESSION_HANDSHAKE)
        session_handshake(session);
    if (silent && session->transport.heard && session->state != SESSION_DOWN)
        /* The identification line has come; from here the other deadline counts. */
        uv_timer_start(&session->uv.timer, session->uv.timer.timer_cb, session->target.timeout, 0);
    if (session->state == SESSION_AUTHENTICATING && !session->gone)
        session_authenticate(session);
    if (session->state == SESSION_UP && !session->gone)
        session_run(session, readable);
    session_leave(session);
}

/* Asks a silent server for a sign of life. The timer is set again only when it has run out, and to
 * a whole second, so that the timers of a thousand idle sessions wake the loop together. */
static void session_watch(struct ssh_session *session) {
    struct transport *t = &session->transport;
    uint64_t now = uv_now(t->loop), timeout = session->target.timeout, due;
    if (session->asked && session->asked + timeout <= now)
        session_receive(session); /* the answer may be here: we may have been the one who slept */
    if (t->answered)
        session->asked = 0;
    if (!session->asked && t->heard + session_patience(session) <= now) {
        session->asked = now;
        t->answered = false;
        session->probe_wanted = true;
        due = now + session_patience(session);
    } else if (!session->asked) {
        due = t->heard + session_patience(session);
    } else if (session->asked + timeout <= now) {
        session_fail(session, -ERR_TIMED_OUT, "the server has not answered for %llu ms",
                     (unsigned long long)(now - session->asked));
        return;
    } else {
        due = session->asked + timeout;
    }
    if (timeout >= 6000)
        due = (due + 999) / 1000 * 1000;
    uv_timer_start(&session->uv.timer, session->uv.timer.timer_cb, due - now, 0);
    session->again = true;
}

/* Until the server's first line; a local one that is slow to accept is tried again meanwhile. */
static void session_await_banner(struct ssh_session *session) {
    uint64_t now = uv_now(session->transport.loop), due = session->connect_due;
    uint64_t left = due > now ? due - now : 1;
    bool crowded = session->transport.crowded && left > SESSION_CONNECT_AGAIN_MS;
    uv_timer_start(&session->uv.timer, session_on_timer, crowded ? SESSION_CONNECT_AGAIN_MS : left,
                   0);
}

static void session_on_timer(uv_timer_t *handle) {
    struct ssh_session *session = handle->data;
    struct transport *t = &session->transport;
    session->busy = true;
    if (session->state == SESSION_UP) {
        session_watch(session);
    } else if (t->crowded && uv_now(t->loop) < session->connect_due) {
        transport_connect(t, &session->target);
        session_await_banner(session);
    } else if (t->crowded) {
        session_fail(session, -ERR_TIMED_OUT, "connecting failed for %u ms: %s",
                     session->target.banner_timeout, transport_error(t));
    } else {
        session_fail(session, -ERR_TIMED_OUT, "%s took longer than %u ms", session_attempt(session),
                     session->transport.heard ? session->target.timeout
                                              : session->target.banner_timeout);
    }
    session_leave(session);
}

void ssh_session_hold(struct ssh_session *session, bool hold) {
    if (session->gone || session->state != SESSION_UP)
        return;
    session->asked = 0;
    session->transport.heard = uv_now(session->transport.loop);
    if (hold)
        uv_timer_stop(&session->uv.timer);
    else
        uv_timer_start(&session->uv.timer, session_on_timer, session_patience(session), 0);
}

void session_schedule(struct ssh_session *session) {
    if (!session->gone && session->state != SESSION_DOWN)
        uv_idle_start(&session->uv.idle, session_on_idle);
}

unsigned session_count_queued(const struct ssh_session *session) {
    unsigned n = 0;
    for (const struct list *l = session->queued.next; l != &session->queued; l = l->next)
        n++;
    return n;
}

unsigned session_load(const struct ssh_session *session) {
    unsigned n = session_count_queued(session);
    const struct list *wires = &session->transport.wires;
    for (const struct list *l = wires->next; l != wires; l = l->next) {
        const struct wire *wire = LIST_OWNER(l, struct wire, link);
        n += wire->channel || wire->closing;
    }
    return n;
}

static int session_copy_target(struct ssh_session *session, const struct ssh_target *target) {
    session->target = *target;
    session->target.user = strdup(target->user);
    session->target.key_path = strdup(target->key_path);
    uint8_t *host_key = malloc(target->host_key_length + 1);
    session->target.host_key = host_key;
    if (!session->target.user || !session->target.key_path || !host_key)
        return -ENOMEM;
    memcpy(host_key, target->host_key, target->host_key_length);
    return 0;
}

/* A server with several host keys is asked for the one we know: its type is the first string of the
 * blob (RFC 4253, 6.6), which is also the name of the algorithm, but for RSA (RFC 8332). */
static void session_prefer_host_key(struct ssh_session *session) {
    const uint8_t *key = session->target.host_key;
    char type[64] = "";
    if (session->target.host_key_length < 4 || key[0] || key[1] || key[2] ||
        key[3] >= sizeof type || session->target.host_key_length < 4u + key[3])
        return;
    memcpy(type, key + 4, key[3]);
    bool rsa = LIBSSH2_VERSION_NUM >= 0x010b00 && strcmp(type, "ssh-rsa") == 0;
    libssh2_session_method_pref(session->transport.ssh, LIBSSH2_METHOD_HOSTKEY,
                                rsa ? "rsa-sha2-512,rsa-sha2-256,ssh-rsa" : type);
}

int ssh_session_open(uv_loop_t *loop, const struct ssh_target *target,
                     const struct ssh_session_events *events, void *arg,
                     struct ssh_session **ret_session) {
    struct ssh_session *session = calloc(1, sizeof *session);
    if (!session)
        return -ENOMEM;
    list_init(&session->queued);
    list_init(&session->channels);
    session->events = *events;
    session->arg = arg;
    int rc = transport_init(&session->transport, loop);
    if (rc == 0)
        rc = session_copy_target(session, target);
    if (rc == 0)
        rc = transport_open(&session->transport, target);
    if (rc == 0)
        rc = uv_poll_init(loop, &session->uv.poll, session->transport.fd);
    if (rc < 0) {
        transport_free(&session->transport, NULL, NULL);
        session_free(session);
        return rc;
    }
    uv_timer_init(loop, &session->uv.timer);
    uv_idle_init(loop, &session->uv.idle);
    session->uv.poll.data = session->uv.timer.data = session->uv.idle.data = session;
    session->uv.open = 3;
    session_count++;
    session_prefer_host_key(session);
    session->transport.allowance = SIZE_MAX;
    session->connect_due = uv_now(loop) + target->banner_timeout;
    session_await_banner(session);
    session_leave(session);
    *ret_session = session;
    return 0;
}

void ssh_session_close(struct ssh_session *session) {
    if (session->gone)
        return;
    session->gone = true;
    session->member = NULL;
    if (!session->busy)
        session_destroy(session);
}
