#pragma once

#include "vm/vm.h"

/* The commands that run in a guest, by their first processes: so that one whose connection or whose
 * daemon was lost is ended when the guest can be reached again, instead of running on with nobody
 * to see it. Kept in a file of the VM's folder, a line each, without waiting for the disk: what
 * counts is the death of the daemon, not of the host. */

struct orphans;

struct orphans *orphans_new(struct vm *vm);
void orphans_free(struct orphans *orphans);

/* A command runs. Returns its place, or -1: there is none left (or no memory). */
int orphans_note(struct orphans *orphans, long pid);
/* It has ended; or it was lost, and is to be ended. */
void orphans_forget(struct orphans *orphans, int place);
void orphans_leave(struct orphans *orphans, int place);

/* An earlier daemon has left these; or the guest was booted anew, and has none of them. */
void orphans_load(struct orphans *orphans);
void orphans_clear(struct orphans *orphans);

/* The guest can be reached: ends them. */
void orphans_end(struct orphans *orphans);
