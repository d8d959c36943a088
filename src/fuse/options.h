#pragma once

#include <stdbool.h>

#include "util/log.h"
#include "vm/daemon.h"

/* The command line. It is read with <fuse_opt.h>, so it lives here. */

struct options {
    struct settings settings;
    bool foreground, help, version;
    bool doctor, json; /* `vmsfs doctor`: no mount, and perhaps no mount point */
    bool others;       /* allow_other or allow_root is asked for */
    enum log_level log_level;
    int fuse_argc; /* for libfuse: its own mount options */
    char **fuse_argv;
};

/* Reads the command line and the environment. False: it is wrong, and stderr says what and why. */
bool options_parse(int argc, char **argv, struct options *ret_options);

/* Looks whether what the options name is there: mount point, /dev/fuse, backend, image. False:
 * stderr says what is missing and the remedy. *ret_backend says what new VMs run in; the caller
 * frees it. */
bool options_check(const struct options *options, char **ret_backend);

void options_print_help(void);
void options_free_arguments(struct options *options);
