#pragma once

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "util/buf.h"

/* How a VM is configured: the files of ID/config/, and the mount options of the same names, which
 * say what new VMs start with. One table of settings is behind both: a setting is a row of
 * config_settings and a field here.
 *
 * Pure functions: whether what a setting names is there (image, key, host) is for the boot to say.
 */

/* The owner calls config_free(). Texts are never NULL once config_init() has succeeded. */
struct vm_config {
    char *backend;         /* by name; "auto": what works here */
    char *image;           /* name or absolute path */
    unsigned vcpus;        /* 0: what the image says */
    unsigned memory;       /* MiB; 0: what the image says */
    unsigned disk;         /* MiB; 0: none */
    char *cpu_model;       /* as QEMU names it, with features; empty: the backend's choice */
    char *boot_args;       /* behind the image's; empty: none */
    unsigned boot_timeout; /* s, from mkdir until running */
    unsigned stop_timeout; /* s, for the guest's own power-down */
    char *env_file;        /* in the guest, absolute */
    char *shell;           /* "login" or "raw": what commands are run by */
    char *protected;       /* "yes": it is not destroyed */
    unsigned lifetime;     /* s, from running; 0: no end */
    unsigned idle_timeout; /* s, without anybody asking for anything; 0: no end */
    char *warm;            /* "off": it boots cold, whatever templates there are */
    char *user;            /* whom to log in as; empty: what the image says, else root */
    char *tap;             /* network interface of the host for the guest's; empty: none */
    char *jail_user;       /* of the host, to run the VMM as, in a jail; empty: no jail */
    /* Of an existing machine. */
    char *address;  /* host name or IP address */
    unsigned port;  /* of its SSH server */
    char *key;      /* private key on the host, absolute; empty: the daemon's own */
    char *host_key; /* file on the host with its public host key, absolute; empty: first use */
};

enum config_kind {
    CONFIG_TEXT,      /* one line; least and most count its bytes */
    CONFIG_NUMBER,    /* least and most are its range */
    CONFIG_SIZE,      /* MiB */
    CONFIG_SECONDS,   /* s */
    CONFIG_CHOICE,    /* one of a few words */
    CONFIG_PATH,      /* absolute, of a file in the guest */
    CONFIG_HOST_PATH, /* absolute, of a file on the host */
    CONFIG_USER_NAME, /* of a user */
    CONFIG_INTERFACE, /* of the host's network */
    CONFIG_CPU_MODEL, /* with features behind commas */
    CONFIG_HOST_NAME, /* or an address */
    CONFIG_IMAGE,     /* a folder's name, or its absolute path */
};

enum {
    CONFIG_LIVE = 1 << 0,    /* may be changed while the VM runs */
    CONFIG_PLACE = 1 << 1,   /* says where the variables are: another place has others */
    CONFIG_MACHINE = 1 << 2, /* says which machine it is: another has another host key */
    CONFIG_OR_ZERO = 1 << 3, /* takes 0 beside its range: none */
};

struct config_setting {
    const char *name;
    enum config_kind kind;
    size_t offset; /* of its field: an unsigned for what is counted, else a char * */
    unsigned least, most;
    const char *standard;       /* the default, as it would be written; "": none */
    const char *otherwise;      /* what holds when it is empty, for the user; NULL: it never is */
    const char *const *choices; /* of CONFIG_CHOICE; NULL-terminated */
    const char *help;           /* one line */
    unsigned flags;             /* of CONFIG_LIVE, … */
};

#define CONFIG_SETTINGS 22
extern const struct config_setting config_settings[CONFIG_SETTINGS]; /* sorted by name */

/* NULL: there is no such setting. */
const struct config_setting *config_find(const char *name);

/* Everything is at its default. -ERR_NO_MEMORY: nothing is to be freed. */
int config_init(struct vm_config *ret_config);
int config_copy(struct vm_config *ret_config, const struct vm_config *from);
void config_free(struct vm_config *config);

/* Changes a setting to what somebody has written: without one newline at its end, and blanks around
 * it. Nothing is the default. 1: it has changed, 0: it was that already. -ERR_INVALID: *ret_why is
 * a sentence that names the setting, what it takes, and its default (the caller frees it).
 * -ERR_NOT_FOUND: there is no such setting; *ret_why names those that there are. */
int config_set(struct vm_config *config, const char *name, const char *text, size_t length,
               char **ret_why);

/* Appends the value as it is written; nothing when it is empty. */
void config_print(const struct vm_config *config, const struct config_setting *setting,
                  struct buf *out);

/* Says in *ret_why that this value is not accepted, as config_set() does. Returns -ERR_INVALID. */
int config_refuse(const struct config_setting *setting, const char *text, size_t length,
                  char **ret_why);

/* Appends "config/NAME", with commas between, for each setting with a text of its own that these
 * words quote, or quote a part of. For who has words that may not be shown: whom to ask about. */
void config_name_quoted(const struct vm_config *config, const char *words, struct buf *out);

/* What stands for a value in a usage text: "N", "PATH", … */
const char *config_placeholder(const struct config_setting *setting);

/* An object with a member for each setting; the caller owns it. NULL: no memory. */
json_t *config_save(const struct vm_config *config);

/* Takes over what config_save() gave; what it does not name is at its default. -ERR_INVALID: some
 * values were not accepted and are at their defaults; *ret_why is about them all. */
int config_load(struct vm_config *config, const json_t *saved, char **ret_why);
