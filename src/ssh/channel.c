#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "ssh/internal.h"
#include "util/errors.h"

/* Output on its way from libssh2 to data(). One for all: callbacks never run the pump. */
static char channel_output[64 * 1024];

int channel_new(const char *command, const struct ssh_channel_events *events, void *arg,
                struct ssh_channel **ret_channel) {
    if (strlen(command) > SSH_COMMAND_MAX)
        return -ERR_COMMAND_TOO_LARGE;
    struct ssh_channel *channel = calloc(1, sizeof *channel);
    if (!channel)
        return -ENOMEM;
    channel->command = strdup(command);
    if (!channel->command) {
        free(channel);
        return -ENOMEM;
    }
    list_init(&channel->link);
    list_init(&channel->pool_link);
    channel->events = *events;
    channel->arg = arg;
    *ret_channel = channel;
    return 0;
}

void channel_free(struct ssh_channel *channel) {
    list_remove(&channel->link);
    list_remove(&channel->pool_link);
    free(channel->command);
    buf_free(&channel->input);
    free(channel);
}

static void channel_leave(struct ssh_channel *channel) {
    if (--channel->busy == 0 && channel->gone)
        channel_free(channel);
}

void channel_attach(struct ssh_channel *channel, struct ssh_session *session) {
    channel->session = session;
    list_remove(&channel->link);
    list_append(&session->queued, &channel->link);
    session_schedule(session);
}

void channel_start(struct ssh_channel *channel, struct wire *wire) {
    wire->channel = channel;
    channel->wire = wire;
    channel->state = CHANNEL_STARTING;
    list_remove(&channel->link);
    list_append(&channel->session->channels, &channel->link);
}

/* Takes the channel from its session and leaves the wire there, to be closed. */
static void channel_detach(struct ssh_channel *channel) {
    struct ssh_session *session = channel->session;
    bool queued = session && !channel->wire;
    if (channel->wire) {
        channel->wire->closing = true;
        channel->wire->channel = NULL;
        channel->wire = NULL;
    }
    list_remove(&channel->link);
    list_remove(&channel->pool_link);
    channel->session = NULL;
    channel->pool = NULL;
    channel->state = CHANNEL_OVER;
    if (session && !session->gone) {
        session_schedule(session);
        if (queued && session->member)
            pool_has_room(session->member);
    }
}

void channel_end(struct ssh_channel *channel, const struct ssh_exit *exit) {
    channel->busy++;
    channel_detach(channel);
    bool ended = exit->end == SSH_EXITED || exit->end == SSH_SIGNALED;
    if (ended && !channel->exit_told && channel->events.exited && !channel->gone)
        channel->events.exited(channel->arg, exit);
    if (!channel->gone)
        channel->events.closed(channel->arg, exit);
    channel_leave(channel);
}

/* How the command ended, as far as libssh2 knows. The signal is to be freed by libssh2_free(). */
static void channel_read_exit(const struct ssh_channel *channel, struct ssh_exit *ret_exit,
                              char **ret_signal) {
    LIBSSH2_CHANNEL *raw = channel->wire->raw;
    *ret_signal = NULL;
    libssh2_channel_get_exit_signal(raw, ret_signal, NULL, NULL, NULL, NULL, NULL);
    if (*ret_signal)
        *ret_exit = (struct ssh_exit){.end = SSH_SIGNALED, .signal = *ret_signal};
    else
        *ret_exit =
            (struct ssh_exit){.end = SSH_EXITED, .status = libssh2_channel_get_exit_status(raw)};
}

static bool channel_has_exit(const struct ssh_channel *channel) {
    const struct wire *wire = channel->wire;
    /* An id that never became known: libssh2 does not free packets where we can see it. */
    return wire->exit_arrived || !wire->id_known || libssh2_channel_get_exit_status(wire->raw) != 0;
}

void channel_lose(struct ssh_channel *channel, int status, const char *why) {
    struct ssh_exit exit = {.end = SSH_LOST, .error = -ERR_COMMAND_LOST, .why = why};
    char *signal = NULL;
    LIBSSH2_SESSION *ssh = channel->session ? channel->session->transport.ssh : NULL;
    if (!channel->exec_sent)
        exit = (struct ssh_exit){.end = SSH_REFUSED, .error = status, .why = why};
    else if (channel->exit_told && channel->wire)
        channel_read_exit(channel, &exit, &signal);
    channel_end(channel, &exit);
    if (signal)
        libssh2_free(ssh, signal);
}

/* Asks the server to run the command (RFC 4254, 6.5). True when it does. */
static bool channel_step_start(struct ssh_channel *channel) {
    struct transport *t = &channel->session->transport;
    size_t before = t->out.len;
    int rc = libssh2_channel_process_startup(channel->wire->raw, "exec", 4, channel->command,
                                             (unsigned)strlen(channel->command));
    /* During a key exchange nothing is sent. */
    if (t->out.len != before)
        channel->exec_sent = true;
    if (rc == LIBSSH2_ERROR_EAGAIN)
        return false;
    if (rc == LIBSSH2_ERROR_CHANNEL_REQUEST_DENIED) {
        channel_end(channel, &(struct ssh_exit){.end = SSH_REFUSED,
                                                .error = -ERR_DENIED,
                                                .why = "the SSH server refused to run a command"});
        return false;
    }
    if (rc < 0) {
        t->broken = rc;
        return false;
    }
    channel->state = CHANNEL_RUNNING;
    free(channel->command);
    channel->command = NULL;
    if (channel->events.opened)
        channel->events.opened(channel->arg);
    return true;
}

static void channel_compact_input(struct ssh_channel *channel) {
    if (channel->input_taken == channel->input.len) {
        buf_free(&channel->input);
        channel->input_taken = 0;
    } else if (channel->input_taken >= SSH_HIGH_WATER) {
        buf_consume(&channel->input, channel->input_taken);
        channel->input_taken = 0;
    }
}

/* Gives libssh2 the input for which the server has a window. After an EAGAIN (it happens during a
 * key exchange) the same bytes come first again: they stay at the head of the buffer. */
static void channel_step_write(struct ssh_channel *channel) {
    struct transport *t = &channel->session->transport;
    while (channel->input_taken < channel->input.len && t->out.len - t->out_sent < OUTPUT_MAX) {
        ssize_t n = libssh2_channel_write_ex(channel->wire->raw, 0,
                                             channel->input.data + channel->input_taken,
                                             channel->input.len - channel->input_taken);
        if (n == LIBSSH2_ERROR_EAGAIN || n == 0)
            break;
        if (n < 0) {
            t->broken = (int)n;
            return;
        }
        channel->input_taken += (size_t)n;
    }
    size_t waiting = channel->input.len - channel->input_taken;
    if (channel->input.cap > 0)
        channel_compact_input(channel);
    if (!waiting && channel->eof_wanted && !channel->eof_sent) {
        int rc = libssh2_channel_send_eof(channel->wire->raw);
        if (rc == 0)
            channel->eof_sent = true;
        else if (rc != LIBSSH2_ERROR_EAGAIN)
            t->broken = rc;
    }
    if (channel->was_high && waiting < SSH_LOW_WATER) {
        channel->was_high = false;
        if (channel->events.drained)
            channel->events.drained(channel->arg);
    }
}

/* The length asked for is always the same: after an EAGAIN libssh2 1.10 repeats a window adjustment
 * with the old number but counts the one it would compute now, and drops what comes above its
 * count. Reads one stream (0 stdout, 1 stderr) until it is empty, the channel is paused or `budget`
 * is used. */
static void channel_read_stream(struct ssh_channel *channel, int stream, size_t *budget) {
    struct ssh_session *session = channel->session;
    while (!channel->paused && *budget) {
        ssize_t n =
            libssh2_channel_read_ex(channel->wire->raw, stream ? SSH_EXTENDED_DATA_STDERR : 0,
                                    channel_output, sizeof channel_output);
        if (n <= 0) {
            if (n < 0 && n != LIBSSH2_ERROR_EAGAIN)
                session->transport.broken = (int)n;
            else
                channel->unread[stream] = 0;
            return;
        }
        *budget -= (size_t)n < *budget ? (size_t)n : *budget;
        channel->unread[stream] -=
            (size_t)n < channel->unread[stream] ? (size_t)n : channel->unread[stream];
        channel->events.data(channel->arg, stream + 1, channel_output, (size_t)n);
        if (channel->gone || channel->state == CHANNEL_OVER || session->gone)
            return;
    }
    if (!*budget)
        session->again = true;
}

/* The exit status counts as arrived when the output that came before it has been handed on. libssh2
 * does not say how much of what it holds came before and on which stream: all of it is taken for
 * each. */
static void channel_note_exit(struct ssh_channel *channel) {
    if (channel->exit_noted || !channel->wire->exit_arrived)
        return;
    unsigned long held = 0;
    libssh2_channel_window_read_ex(channel->wire->raw, &held, NULL);
    channel->unread[0] = channel->unread[1] = held;
    channel->exit_noted = true;
}

static void channel_step_exit(struct ssh_channel *channel) {
    if (!channel->exit_noted || channel->exit_told || channel->unread[0] || channel->unread[1])
        return;
    struct ssh_exit exit;
    char *signal;
    LIBSSH2_SESSION *ssh = channel->session->transport.ssh;
    channel_read_exit(channel, &exit, &signal);
    channel->exit_told = true;
    if (channel->events.exited)
        channel->events.exited(channel->arg, &exit);
    if (signal)
        libssh2_free(ssh, signal);
}

/* The end is the server's CHANNEL_CLOSE: EOF alone means that the command has closed its output. */
static void channel_step_close(struct ssh_channel *channel) {
    LIBSSH2_CHANNEL *raw = channel->wire->raw;
    if (libssh2_channel_eof(raw) != 1 || libssh2_channel_wait_closed(raw) != 0)
        return;
    const struct transport *t = &channel->session->transport;
    /* What a server does when a signal has no name in SSH; but the end of a connection looks alike.
     */
    struct ssh_exit exit = {.end = SSH_SIGNALED, .signal = ""};
    if (t->error || t->mute || t->farewell[0])
        exit = (struct ssh_exit){.end = SSH_LOST,
                                 .error = -ERR_COMMAND_LOST,
                                 .why = "the connection ended without an exit status"};
    char *signal = NULL;
    LIBSSH2_SESSION *ssh = channel->session->transport.ssh;
    if (channel_has_exit(channel))
        channel_read_exit(channel, &exit, &signal);
    channel_end(channel, &exit);
    if (signal)
        libssh2_free(ssh, signal);
}

/* After any callback the channel may be over or gone, its session too. */
static bool channel_goes_on(const struct ssh_channel *channel) {
    return !channel->gone && channel->state != CHANNEL_OVER && channel->session &&
           !channel->session->gone && !channel->session->transport.broken;
}

static void channel_pump_steps(struct ssh_channel *channel) {
    if (channel->state == CHANNEL_STARTING && !channel_step_start(channel) &&
        channel->state == CHANNEL_OVER)
        return;
    if (channel_goes_on(channel) && channel->exec_sent)
        channel_step_write(channel);
    if (!channel_goes_on(channel) || channel->state != CHANNEL_RUNNING)
        return;
    channel_note_exit(channel);
    if (channel->exit_noted)
        channel->paused = false;
    size_t budget = CHANNEL_READ_MAX;
    channel_read_stream(channel, 0, &budget);
    if (channel_goes_on(channel))
        channel_read_stream(channel, 1, &budget);
    if (channel_goes_on(channel))
        channel_step_exit(channel);
    if (channel_goes_on(channel))
        channel_step_close(channel);
}

void channel_pump(struct ssh_channel *channel) {
    channel->busy++;
    channel_pump_steps(channel);
    channel_leave(channel);
}

int ssh_channel_exec(struct ssh_session *session, const char *command,
                     const struct ssh_channel_events *events, void *arg,
                     struct ssh_channel **ret_channel) {
    if (session->gone || session->state == SESSION_DOWN)
        return -ERR_UNREACHABLE;
    struct ssh_channel *channel;
    int rc = channel_new(command, events, arg, &channel);
    if (rc < 0)
        return rc;
    channel_attach(channel, session);
    *ret_channel = channel;
    return 0;
}

ssize_t ssh_channel_write(struct ssh_channel *channel, const void *data, size_t length) {
    if (channel->state == CHANNEL_OVER)
        return -ERR_COMMAND_LOST;
    if (channel->eof_wanted)
        return -EPIPE;
    buf_append(&channel->input, data, length);
    if (channel->input.failed)
        return channel->input.failed;
    size_t waiting = channel->input.len - channel->input_taken;
    if (waiting >= SSH_HIGH_WATER)
        channel->was_high = true;
    if (channel->session)
        session_schedule(channel->session);
    return (ssize_t)waiting;
}

bool ssh_channel_is_asked(const struct ssh_channel *channel) {
    return channel->exec_sent;
}

void ssh_channel_eof(struct ssh_channel *channel) {
    channel->eof_wanted = true;
    if (channel->session)
        session_schedule(channel->session);
}

void ssh_channel_pause(struct ssh_channel *channel, bool paused) {
    bool resumed = channel->paused && !paused;
    channel->paused = paused && !channel->exit_noted;
    if (resumed && channel->session)
        session_schedule(channel->session);
}

void ssh_channel_close(struct ssh_channel *channel) {
    if (channel->gone)
        return;
    channel->gone = true;
    channel_detach(channel);
    if (!channel->busy)
        channel_free(channel);
}
