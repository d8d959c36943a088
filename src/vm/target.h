#pragma once

#include <stdbool.h>

#include "ssh/ssh.h"

struct vm;

/* How to log in to the guest; borrows from the VM. False while that is not known. */
bool vm_target(const struct vm *vm, struct ssh_target *ret_target);
