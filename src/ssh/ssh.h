#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <uv.h>

/* SSH connections (RFC 4251-4254) in the loop, many channels on each. Only this folder includes
 * <libssh2.h>.
 *
 * A session is one connection to one server. Its owner opens it, is told when it is up and when it
 * is down, and closes it. A channel is one remote command on a session (RFC 4254, section 6.5). A
 * pool is the set of connections to one server that share out commands.
 *
 * Rules for all of them: one thread, nothing blocks; no callback is called from inside the function
 * that caused it; closing is allowed at any time, from inside a callback too, and no callback comes
 * after it. */

/* To whom, and as whom. Copied by whoever keeps it. */
struct ssh_target {
    struct sockaddr_storage address;
    socklen_t address_length;
    unsigned vsock_port; /* not 0: the address is the UNIX socket of a VMM, which connects to this
                            port of its guest when it is told `CONNECT PORT`, */
    pid_t peer;          /* and nobody but this process may listen at it */
    const char *user;
    const char *key_path;    /* private key file in OpenSSH format, without passphrase */
    const uint8_t *host_key; /* the one acceptable host key: a public key blob (RFC 4253, 6.6) */
    size_t host_key_length;  /* 0: any is acceptable; trusted() tells which it was, for the next */
    unsigned banner_timeout; /* ms from connect() to the server's identification line. A user-mode
                                network accepts connections before the guest listens, so this is
                                short and the owner tries again */
    unsigned timeout;        /* ms: for key exchange and authentication together, and afterwards the
                                longest silence of a server that has been asked for a sign of life */
};

struct ssh_session;

struct ssh_session_events {
    /* The server has proved that it has this host key, and it is acceptable; authentication
     * follows. May be NULL. */
    void (*trusted)(void *arg, const char *key, size_t length);
    /* Authenticated; channels can be opened. */
    void (*up)(void *arg);
    /* Refused or lost; exactly once, and the last callback. The session's channels have had their
     * closed() before. The owner still has to call ssh_session_close().
     * status: -ERR_UNREACHABLE (refused, reset, closed), -ERR_TIMED_OUT, -ERR_DENIED (host key or
     * authentication). `why` is a sentence for the user. */
    void (*down)(void *arg, int status, const char *why);
};

/* Starts to connect. -errno for what is known at once. */
int ssh_session_open(uv_loop_t *loop, const struct ssh_target *target,
                     const struct ssh_session_events *events, void *arg,
                     struct ssh_session **ret_session);

/* Ends the session without waiting for the server. Its channels are gone without a word: callers
 * that want closed() close channels first. */
void ssh_session_close(struct ssh_session *session);

/* The server is known to stand still, or to go on: meanwhile its silence is no loss. */
void ssh_session_hold(struct ssh_session *session, bool hold);

struct ssh_channel;

enum ssh_end {
    SSH_EXITED,   /* the command's exit status is `status` */
    SSH_SIGNALED, /* it was ended by `signal` ("TERM") */
    SSH_REFUSED,  /* the server did not give a channel, or did not run the command */
    SSH_LOST,     /* the connection or channel ended before an exit status came */
};

struct ssh_exit {
    enum ssh_end end;
    int status;         /* of SSH_EXITED */
    const char *signal; /* of SSH_SIGNALED, without "SIG"; borrowed for the call. Empty: the server
                           has closed the channel and said nothing */
    int error;          /* of SSH_REFUSED and SSH_LOST: -ERR_… */
    const char *why;    /* of SSH_REFUSED and SSH_LOST: a sentence; borrowed for the call */
};

struct ssh_channel_events {
    /* The server runs the command. May be NULL. */
    void (*opened)(void *arg);
    /* Output: stream 1 is stdout, 2 is stderr. Never called with no bytes. Pausing or closing the
     * channel in the callback is allowed. */
    void (*data)(void *arg, int stream, const char *data, size_t length);
    /* The bytes given to ssh_channel_write() and not yet taken by the server have fallen below
     * SSH_LOW_WATER after ssh_channel_write() had returned SSH_HIGH_WATER or more. May be NULL. */
    void (*drained)(void *arg);
    /* The command's exit status (or signal) has arrived. The end of the command: a process it left
     * in the background may hold its output open for ever, so that closed() may never come on its
     * own. May be NULL. All output that the server sent before the exit status has been given to
     * data(). */
    void (*exited)(void *arg, const struct ssh_exit *exit);
    /* The channel is over; the last callback, exactly once. The owner still calls
     * ssh_channel_close(). */
    void (*closed)(void *arg, const struct ssh_exit *exit);
};

#define SSH_HIGH_WATER (256 * 1024)
#define SSH_LOW_WATER (64 * 1024)

/* A command travels in one packet (RFC 4253, 6.1: 32,768 bytes), and dropbear drops the connection
 * above 9,000 bytes; what is longer must come as input. */
#define SSH_COMMAND_MAX 8192

/* Runs `command` in a channel of its own. Channel opens on one session queue up behind each other.
 * -ERR_COMMAND_TOO_LARGE above SSH_COMMAND_MAX, -ERR_UNREACHABLE after down(). On an old dropbear
 * the end of one command can cost the connection while another is being started (see pool.c): a
 * session that is not a pool's should have one command at a time. */
int ssh_channel_exec(struct ssh_session *session, const char *command,
                     const struct ssh_channel_events *events, void *arg,
                     struct ssh_channel **ret_channel);

/* Takes all the bytes (copying what cannot be sent now) and returns how many wait to be sent.
 * Callers hold back above SSH_HIGH_WATER. Also before opened(): then they follow the command.
 * Negative: -errno. */
ssize_t ssh_channel_write(struct ssh_channel *channel, const void *data, size_t length);

/* May the server have been told the command already? */
bool ssh_channel_is_asked(const struct ssh_channel *channel);

/* No more input: sent after all that was written. */
void ssh_channel_eof(struct ssh_channel *channel);

/* While paused, data() is not called and, when the channel's window is full, the command blocks.
 * Other channels of the session go on. Once the command's exit status is here, pausing ends: what
 * is left is bounded by the window (SSH_PAUSED_MOST). */
#define SSH_PAUSED_MOST (2 * 1024 * 1024)
void ssh_channel_pause(struct ssh_channel *channel, bool paused);

/* Frees the channel; sends CHANNEL_CLOSE if the server has not, without waiting for the answer. */
void ssh_channel_close(struct ssh_channel *channel);

/* Commands on as many connections as the server's limits ask for (OpenSSH: MaxSessions, 10 channels
 * a connection). Connections are made on demand, reused, and closed after `idle` ms without a
 * channel (0: never). */
struct ssh_pool;

int ssh_pool_new(uv_loop_t *loop, const struct ssh_target *target, unsigned idle,
                 struct ssh_pool **ret_pool);

/* Like ssh_channel_exec(), on a connection of the pool. A channel that the server refuses for its
 * limit is tried again on another connection, unseen by the caller; one whose connection cannot be
 * made (or is found dead before the command was sent) closes as SSH_REFUSED with the reason; so
 * does, with -ERR_BUSY, one that waits for a place while commands that do not end have them all. */
int ssh_pool_exec(struct ssh_pool *pool, const char *command,
                  const struct ssh_channel_events *events, void *arg,
                  struct ssh_channel **ret_channel);

/* ssh_session_hold() for all of its connections. */
void ssh_pool_hold(struct ssh_pool *pool, bool hold);

/* Closes every connection; channels get closed() as SSH_LOST first, from inside this call. */
void ssh_pool_close(struct ssh_pool *pool);

/* Is each connection given to one command at a time? Known once the first is up; false before. */
bool ssh_pool_is_exclusive(const struct ssh_pool *pool);

/* Numbers for `info`. */
unsigned ssh_pool_connections(const struct ssh_pool *pool);
