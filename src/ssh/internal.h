#pragma once

#include <libssh2.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

#include "ssh/ssh.h"
#include "util/buf.h"
#include "util/list.h"

/* What session.c, transport.c, channel.c and pool.c share.
 *
 * transport.c  the socket under libssh2: its send, receive and free callbacks
 * session.c    connect, handshake, authenticate; the pump; opening channels; liveness
 * channel.c    a command: exec request, input, output, end
 * pool.c       which session a command goes to
 *
 * Everything happens in session_pump(): it is run when the socket is ready and once before the loop
 * sleeps when a caller has changed something (uv_idle), so callbacks never come from inside the
 * call that caused them, and what several calls had to say leaves in one segment.
 *
 * The gate. libssh2 reads the socket whenever it pleases, inside every call. That starves the loop
 * when a server is fast, and it breaks libssh2 1.10: a call that waits for an answer
 * (CHANNEL_SUCCESS) and itself reads the same kind of answer for another channel gives up with an
 * error
 * (_libssh2_packet_requirev). So our receive callback answers EAGAIN except while session_receive()
 * has opened the gate by `allowance` bytes; every other call then works on packets read before. */

#define SESSION_RECEIVE_MAX (256 * 1024) /* read from one socket in one pump */
#define CHANNEL_READ_MAX (256 * 1024)    /* given to one data() in one pump */
#define CHANNEL_WINDOW SSH_PAUSED_MOST   /* what a paused channel may leave with us */
#define SESSION_CHANNELS 10              /* OpenSSH's MaxSessions, unless set otherwise */
#define OUTPUT_MAX (256 * 1024)          /* above it, channel input stays with its channel */

/* Our end of a libssh2 channel. It outlives its ssh_channel until the server has closed it too. */
struct wire {
    struct list link; /* in transport.wires */
    LIBSSH2_CHANNEL *raw;
    struct ssh_channel *channel; /* NULL: closing */
    uint32_t id;                 /* ours, as the server names it; see transport_free_memory() */
    bool id_known;
    bool exit_arrived;
    bool closing;
};

struct transport {
    uv_loop_t *loop; /* for its clock */
    int fd;
    LIBSSH2_SESSION *ssh; /* NULL: over */
    struct list wires;
    struct buf out; /* packets that libssh2 has made; sent up to out_sent */
    size_t out_sent;
    char grant[32]; /* what the VMM has said to transport_ask() */
    size_t grant_length;
    size_t allowance;   /* the gate: bytes that may be read from the socket now */
    uint64_t heard;     /* loop time of the newest byte from the server; 0 before the first */
    bool answered;      /* something has come since this was cleared */
    int error;          /* errno after which nothing more comes; ECONNRESET also for its end */
    bool mute;          /* sending has failed; what the server said before is still read */
    int broken;         /* libssh2's error after which it is of no use */
    bool dead;          /* being freed: whatever libssh2 wants fails at once */
    uint32_t newest_id; /* of the newest CHANNEL_OPEN_CONFIRMATION */
    bool newest_known;
    char farewell[160]; /* the text of SSH_MSG_DISCONNECT, or why there is no connection */
    bool
        crowded; /* not connected: too many wait already; transport_connect() may be called again */
};

int transport_init(struct transport *t, uv_loop_t *loop);
/* Makes the socket, first, and connects it, or begins to. The failure of connect() itself is left
 * in t->error, so that it is reported like one that comes later. */
int transport_open(struct transport *t, const struct ssh_target *target);
void transport_connect(struct transport *t, const struct ssh_target *target);
/* Asks the VMM at the other end for a port of its guest; and whether it is connected: -EAGAIN while
 * that is not known, -ECONNREFUSED when it has refused. */
void transport_ask(struct transport *t, unsigned vsock_port);
int transport_hear(struct transport *t);
/* Sends what can be sent. */
void transport_flush(struct transport *t);
static inline bool transport_has_output(const struct transport *t) {
    return t->out.len > t->out_sent;
}
/* Closes and frees everything but the struct, without a word to the server. `resume` is called once
 * before, if not NULL: a libssh2 call that was under way, so that it meets the dead socket and
 * frees what only it knows. */
void transport_free(struct transport *t, void (*resume)(void *arg), void *arg);
/* libssh2's name for its newest error, for a sentence. */
const char *transport_error(struct transport *t);

enum session_state {
    SESSION_CONNECTING,
    SESSION_ASKING, /* a VMM for its guest */
    SESSION_HANDSHAKE,
    SESSION_AUTHENTICATING,
    SESSION_UP,
    SESSION_DOWN,
};

enum session_opening { OPENING_NOTHING, OPENING_CHANNEL, OPENING_PROBE };

struct pool_member;

struct ssh_session {
    struct transport transport;
    struct ssh_target target; /* its strings are ours */
    struct ssh_session_events events;
    void *arg;
    enum session_state state;
    struct {
        uv_poll_t poll;
        uv_timer_t timer;
        uv_idle_t idle;
        unsigned open; /* until each has had its close callback */
        int poll_events;
    } uv;
    struct list queued;           /* ssh_channels that wait for a wire */
    struct list channels;         /* ssh_channels with a wire */
    enum session_opening opening; /* the one CHANNEL_OPEN that may be under way */
    uint64_t connect_due;         /* loop time until which a crowded server is tried */
    uint64_t asked;               /* loop time of a question not yet answered; 0: none */
    bool probe_wanted;
    bool gave_channel;          /* the server has once opened one */
    bool busy;                  /* inside session_pump() or the timer: freeing waits */
    bool gone;                  /* closed by the owner */
    bool again;                 /* there is more to do before the loop sleeps */
    struct pool_member *member; /* NULL: not of a pool */
};

enum channel_state { CHANNEL_QUEUED, CHANNEL_STARTING, CHANNEL_RUNNING, CHANNEL_OVER };

struct ssh_channel {
    struct list link;            /* in session.queued or .channels, or in pool.waiting */
    struct list pool_link;       /* in pool.channels */
    struct ssh_session *session; /* NULL: waits in the pool, or over */
    struct ssh_pool *pool;       /* NULL: not of a pool, or over */
    struct wire *wire;
    struct ssh_channel_events events;
    void *arg;
    enum channel_state state;
    char *command;
    struct buf input; /* taken by libssh2 up to input_taken */
    size_t input_taken;
    size_t unread[2]; /* bytes of stdout, stderr that may have come before the exit status */
    unsigned busy;    /* callbacks under way: freeing waits */
    bool gone;        /* closed by the owner */
    bool paused;
    bool eof_wanted, eof_sent;
    bool was_high;  /* drained() is owed */
    bool exec_sent; /* from here on, the command may have run */
    bool exit_noted, exit_told;
};

/* session.c */
void session_schedule(struct ssh_session *session);
/* Channels that the server holds or is to hold for us: queued, open, and closing. */
unsigned session_load(const struct ssh_session *session);
unsigned session_count_queued(const struct ssh_session *session);

/* channel.c */
int channel_new(const char *command, const struct ssh_channel_events *events, void *arg,
                struct ssh_channel **ret_channel);
void channel_attach(struct ssh_channel *channel, struct ssh_session *session);
void channel_start(struct ssh_channel *channel, struct wire *wire);
void channel_pump(struct ssh_channel *channel);
/* Calls closed() and takes the channel out of everything. It may be freed inside. */
void channel_end(struct ssh_channel *channel, const struct ssh_exit *exit);
/* The same with the reason that its session has ended. */
void channel_lose(struct ssh_channel *channel, int status, const char *why);
void channel_free(struct ssh_channel *channel);

/* pool.c */
/* The server did not open a channel for the queued `channel`. True: it will be tried elsewhere. */
bool pool_takes_refused(struct ssh_channel *channel);
/* The session of a queued `channel` has failed. True: it will be tried elsewhere. */
bool pool_takes_lost(struct ssh_channel *channel);
/* A channel of the member has ended. */
void pool_has_room(struct pool_member *member);
