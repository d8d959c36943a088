#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vm/vm.h"

/* The control connection of a guest: an SSH connection whose only user is a resident shell. A
 * request is a line of script; its answer is the script's output and exit status; that is one round
 * trip. */

struct control;
struct control_request;

/* output is valid during the call. status: the script's exit status (>= 0), or -ERR_… when there is
 * no answer: then what the script did is unknown. */
typedef void control_done(void *arg, int status, const char *output, size_t length);

struct control *control_new(struct vm *vm);
void control_free(struct control *control);

/* Connects to where the VMM says the guest is, and again when the connection is lost, until
 * control_stop(). Tells vm_guest_up() each time the shell answers, vm_guest_lost() when it is lost.
 * `later`: somebody will call control_hurry() when the guest listens; not for long, though. */
void control_start(struct control *control, bool later);

/* The guest is known to listen now: an attempt that waits for an answer since before is given up
 * for a new one. */
void control_hurry(struct control *control);

/* Gives up the connection for a new one, after a while: vm_guest_up() comes again. */
void control_again(struct control *control);

/* Its guest is paused, or goes on: meanwhile silence is no loss, and no deadline passes. */
void control_hold(struct control *control, bool hold);

/* Does the shell answer? */
bool control_is_up(const struct control *control);

/* Is nothing waiting for an answer? */
bool control_is_idle(const struct control *control);

/* Ends the connection; waiting requests fail with `status`. */
void control_stop(struct control *control, int status);

/* `done` is called exactly once, from the loop. Answers come in the order of the requests. The
 * deadline is settings.timeout: past it the connection is given up. -ERR_UNREACHABLE when there is
 * no connection. */
int control_request(struct control *control, const struct buf *script, control_done *done,
                    void *arg);
