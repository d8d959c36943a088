#pragma once

#include "tree/node.h"
#include "vm/vm.h"

/* A request that waits for its VM: for the verdict on a change, for the guest's newest word, for a
 * state. It can be interrupted and has a deadline; whichever comes first, `answer` is called once,
 * and answers the request. */

typedef void guest_answer(void *arg, int status, struct request *rq);

/* Parks `rq`. What is returned goes to the function of the VM layer that is to be waited for; if
 * that refuses, guest_wait_settle() follows. Meanwhile the node is held (node_child). `what` is
 * named in `error` when the deadline passes; NULL: no deadline but that of what is waited for.
 * NULL: no memory, `answer` has been called. */
struct vm_wait *guest_wait(struct node *node, const char *what, guest_answer *answer, void *arg,
                           struct request *rq);
void guest_wait_settle(struct vm_wait *wait, int status);
