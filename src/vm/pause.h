#pragma once

#include "vm/vars.h"

/* Begins to pause a running VM, or to let a paused one go on; whoever waits for the state is told.
 * -ERR_UNSUPPORTED: its backend cannot do that. */
int vm_pause(struct vm *vm);
int vm_resume(struct vm *vm);

/* It is stopped, or has ended, while it was paused; or it is not stopped after all. */
void vm_end_pause(struct vm *vm);
void vm_hold_pause(struct vm *vm);
