#pragma once

#include "vm/vm.h"

/* An existing machine as a VM (vmm_ops.existing): it is not booted but attached, and left alone
 * when it is stopped. What has to be known of it beyond a guest of ours: its host key, which was
 * given or is learned at the first connection, and whether its variables are those of the table. */

/* Is it one? */
bool machine_is_existing(const struct vm *vm);

/* The private key to log in with. */
const char *machine_key_path(const struct vm *vm);

/* Where the host key is from, for `info`; NULL: there is none yet. */
const char *machine_host_key_source(const struct vm *vm);

/* The server has shown this host key, which is the one that was asked for, or any if none is known:
 * then it is learned. */
void machine_trust(struct vm *vm, const char *key, size_t length);

/* A connection was refused, or had no answer; it is tried again. `trusted`: its host key had been
 * accepted. */
void machine_no_answer(struct vm *vm, int status, bool trusted, const char *why);

/* What has kept it, or any guest, from answering; of an existing machine with a remedy. Never
 * empty.
 */
const char *machine_trouble(const struct vm *vm);

/* A setting that says which machine it is or where its variables are has changed. */
void machine_changed(struct vm *vm, const struct config_setting *setting);

/* An existing machine without an address: leaves words. */
bool machine_is_nowhere(struct vm *vm);

/* It is left: ends what vmsfs runs there, which nobody would see any more. `then` is called when
 * that has ended, has taken too long, or cannot be told; at once, if there is nothing to end. */
void machine_end_commands(struct vm *vm, void (*then)(struct vm *vm));

/* What has to be done before it is attached, in the thread pool: looks for the files that the
 * configuration names, and reads the host key. On error *ret_why is a sentence. */
int machine_prepare(const struct vm_config *config, const char *key_path, struct buf *ret_host_key,
                    char **ret_why);

/* For the VM's record. */
void machine_save(const struct vm *vm, json_t *record);
void machine_load(struct vm *vm, const json_t *record);
