#pragma once

#include "vm/vm.h"

/* What VMs are made from: the defaults of the mount (.defaults/), VMs that are being prepared
 * (.new/NAME/), and the environment of who asks. Both are VMs that are never booted: they have
 * variables, settings and `forward`, recorded as those of any VM.
 *
 * Variables of a new VM, later wins: the defaults', the prepared, what is forwarded. Its settings
 * are the prepared ones, or those of the defaults. */

struct vm *prepare_find(struct daemon *d, const char *name);

/* Makes an empty one with the settings of the defaults. -ERR_INVALID, -ERR_EXISTS, … */
int prepare_make(struct daemon *d, const char *name, struct vm **ret_vm);

/* GNU cp and mv, who have made a directory, take for granted that nothing is in it, and create all
 * that they copy with O_EXCL or mkdir(2). So while one of them fills what he has made, the files
 * that are there by themselves are hidden until he makes them. `slot`: of the file in its VM's
 * inode numbers, below 64. */
void prepare_note_maker(struct vm *vm, pid_t pid);
bool prepare_hides(struct vm *vm, uint64_t slot);
void prepare_show(struct vm *vm, uint64_t slot);

/* Another name. -ERR_EXISTS, -ERR_NOT_PERMITTED, …; -ERR_BUSY while its record is being written: to
 * be tried again when vm_save_for() says so. */
int prepare_rename(struct vm *vm, const char *name);

/* Removes it, with its files. */
void prepare_remove(struct vm *vm);

/* Changes `forward`. 0: `wait` (may be NULL) is told when it is on the disk, or that it was taken
 * back. -ERR_INVALID: a line is bad, `error` says which; -ERR_TOO_LARGE. */
#define FORWARD_LIMIT 65536
int prepare_refuse_forward(struct vm *vm);
int prepare_set_forward(struct vm *vm, const char *text, size_t length, struct vm_wait *wait);

/* Who asks for a VM. */
struct asker {
    pid_t pid; /* its thread; 0: not known here */
    uid_t uid;
};

/* Makes the VM `id` from what is prepared (NULL: from the defaults alone), which is gone after
 * that. `wait` is told when it is there and boots, or why not: then what is prepared is as it was,
 * and its `error` has words. It may be told from inside this call. */
void prepare_create(struct daemon *d, const char *id, struct vm *prepared,
                    const struct asker *asker, struct vm_wait *wait);

/* The last daemon made this VM, and was killed before it had removed what it was made from. */
void prepare_finish(struct vm *vm);

/* What is recorded, at the start. */
/* Some have no number then. On error *ret_why may be a sentence (the caller frees it). */
int prepare_load(struct daemon *d, char **ret_why);
/* Lets go of it, at the end. */
void prepare_release(struct daemon *d);
