#pragma once

#include <stdbool.h>

/* What the backends that run a program of their own ask of this host. */

/* The absolute path of a program: from PATH, or where distributions put it. -ENOENT: nowhere. The
 * caller frees it. */
int host_find_program(const char *name, char **ret_path);

/* Whether KVM can be expected to work. If not, *ret_why (if not NULL) says in a few words why.
 * VMSFS_KVM=yes and VMSFS_KVM=no in the daemon's environment know better. */
bool host_has_kvm(const char **ret_why);

/* Can /dev/kvm be opened? That says little by itself. */
bool host_kvm_opens(void);

/* FOLDER/NAME; NULL: no memory. The caller frees it. */
char *host_join(const char *folder, const char *name);
