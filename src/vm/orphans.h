#pragma once

#include "vm/vm.h"

/* What runs in a guest for vmsfs: the resident shell, whose end the next one waits for
 * (guest_ops.control_hello), and the commands, by their first processes: so that one whose
 * connection or whose daemon was lost is ended when the guest can be reached again, instead of
 * running on with nobody to see it. Kept in a file of the VM's folder, a line each, without waiting
 * for the disk: what counts is the death of the daemon, not of the host. */

struct orphans;

struct orphans *orphans_new(struct vm *vm);
void orphans_free(struct orphans *orphans);

/* A command runs. Returns its place, or -1: there is none left (or no memory). */
int orphans_note(struct orphans *orphans, long pid);
/* It has ended; or it was lost, and is to be ended. */
void orphans_forget(struct orphans *orphans, int place);
void orphans_leave(struct orphans *orphans, int place);

/* An earlier daemon has left these, and vm->facts of its resident shell; or the guest was booted
 * anew, and has none of them. */
void orphans_load(struct orphans *orphans);
void orphans_clear(struct orphans *orphans);

/* The guest has been reached, by a resident shell of which vm->facts tells. What ran in an earlier
 * boot of it runs no more. */
void orphans_meet(struct orphans *orphans);

/* Ends those that were lost. */
void orphans_end(struct orphans *orphans);
