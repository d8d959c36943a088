#include "fuse/options.h"

#include <errno.h>
#include <fuse_opt.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "fuse/device.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "util/mounts.h"
#include "util/number.h"
#include "vm/boot.h"
#include "vm/image.h"
#include "vm/spool.h"
#include "vmm/vmm.h"

#define DEFAULT_TIMEOUT 10
#define DEFAULT_SCRATCH_TIMEOUT 600
#define NUMBER_TEXT(number) #number
#define NUMBER(name) NUMBER_TEXT(name)

/* As they were given. Numbers are checked afterwards, as a whole; what new VMs start with at once.
 */
struct raw_options {
    char *state, *images, *timeout, *scratch_timeout, *output_max, *log_level;
    struct vm_config config;
    bool backend_given;
    int ephemeral, foreground, debug, help, version, json;
    bool doctor, others;
    char *arguments[2];
    int count;
    bool failed;
};

#define TEXT(name)                                                                                 \
    { #name "=%s", offsetof(struct raw_options, name), 0 }
#define FLAG(option, name)                                                                         \
    { option, offsetof(struct raw_options, name), 1 }
static const struct fuse_opt option_table[] = {
    TEXT(state),
    TEXT(images),
    TEXT(timeout),
    TEXT(scratch_timeout),
    TEXT(output_max),
    TEXT(log_level),
    FLAG("ephemeral", ephemeral),
    FLAG("-f", foreground),
    FLAG("-d", debug),
    FLAG("debug", debug),
    FLAG("-h", help),
    FLAG("--help", help),
    FLAG("-V", version),
    FLAG("--version", version),
    FLAG("--json", json),
    FUSE_OPT_END,
};

/* Programs read this as well (contrib/completions): an option, two blanks or a line's end, what it
 * does; behind = what it takes, in capitals, or the words to choose from. */
#define HELP_COLUMN 29
static void help_print(const char *option, const char *help) {
    if (strlen(option) > HELP_COLUMN)
        printf("    %s\n    %-*s  %s\n", option, HELP_COLUMN, "", help);
    else
        printf("    %-*s  %s\n", HELP_COLUMN, option, help);
}

static void help_print_setting(const struct config_setting *s) {
    cleanup_buf struct buf option = {0}, help = {0};
    buf_printf(&option, "-o %s=", s->name);
    for (size_t i = 0; s->choices && s->choices[i]; i++)
        buf_printf(&option, "%s%s", i ? "|" : "", s->choices[i]);
    if (!s->choices)
        buf_append_str(&option, config_placeholder(s));
    buf_printf(&help, "%s (%s)", s->help, s->standard[0] ? s->standard : s->otherwise);
    if (!option.failed && !help.failed)
        help_print(option.data, help.data);
}

static const struct {
    const char *option, *help;
} help_options[] = {
    {"-f", "stay in the foreground, log to stderr"},
    {"-d, -o debug", "the same, with all that there is to log"},
    {"-h, --help", "this text"},
    {"-V, --version", "the version"},
    {"--json", "doctor: its report as JSON"},
    {"-o state=DIR", "where VMs are recorded (see below)"},
    {"-o images=DIR", "look for images here first"},
    {"-o timeout=S", "longest wait for an answer of a guest (" NUMBER(DEFAULT_TIMEOUT) ")"},
    {"-o scratch_timeout=S",
     "how long temporary files of tools live unused (" NUMBER(DEFAULT_SCRATCH_TIMEOUT) ")"},
    {"-o output_max=BYTES", "how much of a command's output is kept (1G)"},
    {"-o log_level=error|warning|info|debug", "what is logged; debug: each request, too (info)"},
    {"-o ephemeral", "destroy the VMs of this mount with it"},
};

void options_print_help(void) {
    printf("usage: vmsfs [SOURCE] MOUNTPOINT [-f] [-d] [-o OPTION,…]\n"
           "       vmsfs doctor [--json] [MOUNTPOINT] [-o OPTION,…]\n"
           "       vmsfs --connect SOCKET PORT   (what ssh_config has for guests with a vsock)\n"
           "\n"
           "Shows virtual machines as directories: mkdir boots one, files in it set its\n"
           "environment variables, run commands and tell how it is. `vmsfs doctor` looks\n"
           "for what keeps that from working here, and says what to do about it.\n"
           "\n");
    for (size_t i = 0; i < sizeof help_options / sizeof *help_options; i++)
        help_print(help_options[i].option, help_options[i].help);
    printf("\n"
           "What new VMs start with, each to be changed in ID/config/:\n");
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        help_print_setting(&config_settings[i]);
    printf("\n"
           "The state directory is /var/lib/vmsfs for root, else $XDG_STATE_HOME/vmsfs or\n"
           "~/.local/state/vmsfs. VMSFS_BACKEND is another default for backend=.\n"
           "VMSFS_KVM=yes or no says whether KVM works here, where the CPU's flags and\n"
           "/dev/kvm would say otherwise.\n"
           "VMSFS_VERBOSE_BOOT=1 shows the kernel's messages on the console. The log is\n"
           "on stderr in the foreground; else in the system's log, or where there is none\n"
           "in the file log of the state directory.\n"
           "\n"
           "Options of FUSE (allow_other always comes with default_permissions):\n");
}

static bool option_say_why(const char *option, const char *why) {
    fprintf(stderr, "vmsfs: %s: %s\n", option, why ? why : "out of memory");
    return false;
}

/* Of this program, for others to start. No realpath(): the folders above need not be open to us. */
static char *program_path(void) {
    char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path);
    return n > 0 && n < PATH_MAX ? strndup(path, (size_t)n) : strdup("vmsfs");
}

/* An absolute path, also of what is not there yet. The daemon runs in /. */
static char *absolute_path(const char *path) {
    char *absolute = NULL;
    cleanup_free char *cwd = NULL;
    if (path[0] == '/')
        return strdup(path);
    cwd = getcwd(NULL, 0);
    if (!cwd || asprintf(&absolute, "%s/%s", cwd, path) < 0)
        return NULL;
    return absolute;
}

/* Takes `NAME=VALUE` for a setting of new VMs. -ERR_NOT_FOUND: it is none. */
static int option_setting(struct raw_options *raw, const char *arg) {
    const char *equals = strchrnul(arg, '=');
    cleanup_free char *name = strndup(arg, (size_t)(equals - arg)), *option = NULL, *why = NULL;
    const struct config_setting *setting = name ? config_find(name) : NULL;
    if (name && !setting)
        return -ERR_NOT_FOUND;
    const char *value = *equals ? equals + 1 : "";
    cleanup_free char *absolute = NULL;
    if (name && setting->kind == CONFIG_HOST_PATH && value[0] && (absolute = absolute_path(value)))
        value = absolute;
    int r = -ERR_NO_MEMORY;
    if (name && asprintf(&option, "-o %s=%s", name, value) >= 0)
        /* In config/ nothing stands for the default; here it is a slip. */
        r = value[0] ? config_set(&raw->config, name, value, strlen(value), &why)
                     : config_refuse(setting, value, 0, &why);
    if (r < 0)
        raw->failed = !option_say_why(option ? option : arg, why);
    raw->backend_given |= name && strcmp(name, "backend") == 0;
    return r;
}

static int option_other(void *data, const char *arg, int key, struct fuse_args *args) {
    struct raw_options *raw = data;
    (void)args;
    if (key == FUSE_OPT_KEY_OPT) {
        int r = arg[0] == '-' ? -ERR_NOT_FOUND : option_setting(raw, arg);
        if (r != -ERR_NOT_FOUND)
            return r < 0 ? -1 : 0;
        raw->others |= strcmp(arg, "allow_other") == 0 || strcmp(arg, "allow_root") == 0;
        /* What is left is libfuse's, which takes options with `-o` only. */
        if (arg[0] == '-') {
            fprintf(stderr, "vmsfs: unknown option %s; vmsfs -h lists them\n", arg);
            raw->failed = true;
            return -1;
        }
        return 1;
    }
    if (raw->count == 2) {
        fprintf(stderr,
                "vmsfs: one argument too many: %s\nusage: vmsfs [SOURCE] MOUNTPOINT [-o …]\n", arg);
        raw->failed = true;
        return -1;
    }
    raw->arguments[raw->count++] = strdup(arg);
    return 0;
}

static bool option_number(const char *name, const char *text, unsigned least, unsigned most,
                          unsigned fallback, unsigned *ret_number) {
    *ret_number = fallback;
    if (!text)
        return true;
    char *end;
    errno = 0;
    unsigned long n = strtoul(text, &end, 10);
    if (errno || end == text || *end || text[0] < '0' || text[0] > '9' || n < least || n > most) {
        fprintf(stderr, "vmsfs: -o %s=%s: takes a number from %u to %u\n", name, text, least, most);
        return false;
    }
    *ret_number = (unsigned)n;
    return true;
}

static char *default_state_dir(void) {
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    char *path = NULL;
    int n = getuid() == 0              ? asprintf(&path, "/var/lib/vmsfs")
            : state && state[0] == '/' ? asprintf(&path, "%s/vmsfs", state)
            : home && home[0] == '/'   ? asprintf(&path, "%s/.local/state/vmsfs", home)
                                       : -1;
    return n < 0 ? NULL : path;
}

/* Sockets have short paths (sun_path has 108 bytes) and go with a reboot. Each state directory has
 * a folder of its own: FNV-1a of its path. */
static char *runtime_dir(const char *state_dir) {
    uint64_t hash = number_hash(state_dir, strlen(state_dir));
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    char *path = NULL;
    int n = getuid() == 0 ? asprintf(&path, "/run/vmsfs/%016llx", (unsigned long long)hash)
            : runtime && runtime[0] == '/'
                ? asprintf(&path, "%s/vmsfs/%016llx", runtime, (unsigned long long)hash)
                : asprintf(&path, "%s/run", state_dir);
    return n < 0 ? NULL : path;
}

static bool is_yes(const char *text) {
    static const char *const words[] = {"1", "true", "yes", "on"};
    for (size_t i = 0; text && i < sizeof words / sizeof *words; i++)
        if (strcasecmp(text, words[i]) == 0)
            return true;
    return false;
}

/* $VMSFS_BACKEND, where no option says otherwise. */
static bool options_take_environment(struct raw_options *raw) {
    const char *backend = getenv("VMSFS_BACKEND");
    cleanup_free char *why = NULL;
    if (raw->backend_given || !backend || !backend[0] ||
        config_set(&raw->config, "backend", backend, strlen(backend), &why) >= 0)
        return true;
    return option_say_why("VMSFS_BACKEND", why);
}

/* An empty path would be the current directory, an empty name nothing that can be looked for. */
static bool texts_are_given(const struct raw_options *raw) {
    const struct {
        const char *name, *text;
    } texts[] = {{"state", raw->state}, {"images", raw->images}};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].text && !texts[i].text[0]) {
            fprintf(stderr, "vmsfs: -o %s= is empty: give it a value, or leave it out\n",
                    texts[i].name);
            return false;
        }
    return true;
}

static bool options_take(struct raw_options *raw, struct settings *s) {
    if (!texts_are_given(raw))
        return false;
    s->config = raw->config;
    raw->config = (struct vm_config){0};
    s->state_dir = raw->state ? absolute_path(raw->state) : default_state_dir();
    s->images_dir = raw->images ? absolute_path(raw->images) : NULL;
    s->verbose_boot = is_yes(getenv("VMSFS_VERBOSE_BOOT"));
    s->ephemeral = raw->ephemeral;
    if (!s->state_dir) {
        fprintf(stderr, "vmsfs: no state directory: set HOME, or name one with -o state=DIR\n");
        return false;
    }
    s->runtime_dir = runtime_dir(s->state_dir);
    s->program = program_path();
    if (raw->count)
        s->mountpoint = absolute_path(raw->arguments[raw->count - 1]);
    if (!s->runtime_dir || !s->program || (raw->count && !s->mountpoint)) {
        fprintf(stderr, "vmsfs: out of memory\n");
        return false;
    }
    if (!option_number("timeout", raw->timeout, 1, 86400, DEFAULT_TIMEOUT, &s->timeout) ||
        !option_number("scratch_timeout", raw->scratch_timeout, 1, 86400, DEFAULT_SCRATCH_TIMEOUT,
                       &s->scratch_timeout))
        return false;
    s->output_max = SPOOL_LIMIT_DEFAULT;
    if (raw->output_max &&
        (number_parse_size(raw->output_max, 1, &s->output_max) < 0 ||
         s->output_max < SPOOL_LIMIT_LEAST || s->output_max > SPOOL_LIMIT_MOST)) {
        fprintf(stderr, "vmsfs: -o output_max=%s: takes bytes from 64K to 1T, such as 100M\n",
                raw->output_max);
        return false;
    }
    s->scratch_timeout *= 1000;
    s->timeout *= 1000;
    return true;
}

static void raw_free(struct raw_options *raw) {
    char *all[] = {raw->state,      raw->images,    raw->timeout,      raw->scratch_timeout,
                   raw->output_max, raw->log_level, raw->arguments[0], raw->arguments[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    config_free(&raw->config);
}

/* What `mount` and df show as the device. A comma would end the option: fuse_opt.h takes it behind
 * a backslash. */
static void add_fuse_options(struct fuse_args *args, const char *source) {
    cleanup_buf struct buf name = {0};
    buf_append_str(&name, "-ofsname=");
    for (const char *c = source && source[0] ? source : "vmsfs"; *c; c++)
        buf_printf(&name, *c == ',' || *c == '\\' ? "\\%c" : "%c", *c);
    if (!name.failed)
        fuse_opt_add_arg(args, name.data);
    fuse_opt_add_arg(args, "-osubtype=vmsfs");
    fuse_opt_add_arg(args, "-odefault_permissions");
}

static bool options_take_log_level(const struct raw_options *raw, enum log_level *ret_level) {
    *ret_level = raw->debug ? LOG_LEVEL_DEBUG : LOG_LEVEL_INFO;
    if (!raw->log_level || log_level_find(raw->log_level, ret_level))
        return true;
    fprintf(stderr, "vmsfs: -o log_level=%s: takes error, warning, info or debug\n",
            raw->log_level);
    return false;
}

/* `--`, behind which a source may look like an option, stays in the list if there are others. */
static void drop_separator(struct fuse_args *args) {
    char **last = &args->argv[args->argc - 1];
    if (args->argc > 1 && strcmp(*last, "--") == 0) {
        free(*last);
        *last = NULL;
        args->argc--;
    }
}

bool options_parse(int argc, char **argv, struct options *ret_options) {
    struct raw_options raw = {0};
    struct options options = {0};
    /* A mount point of this name can be given as ./doctor. */
    raw.doctor = argc > 1 && strcmp(argv[1], "doctor") == 0;
    argc -= raw.doctor;
    char **words = argv + raw.doctor;
    struct fuse_args args = FUSE_ARGS_INIT(argc, words);
    bool ok = config_init(&raw.config) == 0 &&
              fuse_opt_parse(&args, &raw, option_table, option_other) == 0 && !raw.failed &&
              options_take_environment(&raw);
    options.help = raw.help;
    options.version = raw.version;
    options.foreground = raw.foreground || raw.debug;
    ok = ok && options_take_log_level(&raw, &options.log_level);
    if (ok && raw.json && !raw.doctor) {
        fprintf(stderr, "vmsfs: --json is an option of vmsfs doctor\n");
        ok = false;
    }
    options.doctor = raw.doctor;
    options.json = raw.json;
    options.others = raw.others;
    if (ok && !raw.help && !raw.version) {
        if (raw.count == 0 && !raw.doctor) {
            fprintf(stderr, "vmsfs: no mount point\nusage: vmsfs [SOURCE] MOUNTPOINT [-o …]\n");
            ok = false;
        } else {
            ok = options_take(&raw, &options.settings);
        }
    }
    if (ok) {
        drop_separator(&args);
        add_fuse_options(&args, raw.count == 2 ? raw.arguments[0] : NULL);
    } else {
        fuse_opt_free_args(&args);
    }
    options.fuse_argc = ok ? args.argc : 0;
    options.fuse_argv = ok ? args.argv : NULL;
    raw_free(&raw);
    *ret_options = options;
    return ok;
}

void options_free_arguments(struct options *options) {
    if (!options->fuse_argv)
        return;
    struct fuse_args args = {
        .argc = options->fuse_argc, .argv = options->fuse_argv, .allocated = 1};
    fuse_opt_free_args(&args);
}

static bool mount_is_dead(const char *path) {
    struct stat st;
    struct statfs fs;
    /* statfs(2): the kernel may know the attributes of what is mounted there for longer than its
     * daemon lives. */
    return (stat(path, &st) < 0 || statfs(path, &fs) < 0) && errno == ENOTCONN;
}

struct mount_search {
    const char *path;
    bool ours;
};

static void mount_look(void *arg, const struct mounts_entry *entry) {
    struct mount_search *search = arg;
    if (strcmp(entry->path, search->path) == 0)
        search->ours = strcmp(entry->type, "fuse.vmsfs") == 0;
}

/* Is what is mounted there of a daemon of ours? */
static bool mount_is_ours(const char *path) {
    struct mount_search search = {.path = path};
    return mounts_each("/proc/self/mountinfo", mount_look, &search) == 0 && search.ours;
}

/* Clears away what a daemon of ours that was killed has left mounted there. Of several that start
 * at once one does, while it has the lock of the state directory itself: what the next finds is no
 * longer dead, or not yet there. */
static bool clear_dead_mount(const char *path, const char *state_dir) {
    cleanup_free char *copy = strdup(path), *real = NULL;
    for (size_t n = copy ? strlen(copy) : 0; n > 1 && copy[n - 1] == '/'; n--)
        copy[n - 1] = '\0'; /* else realpath() would look into it */
    real = copy ? realpath(copy, NULL) : NULL;
    const char *const unmount[] = {"fusermount3", "-uz", real, NULL};
    cleanup_close int lock = open(state_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock >= 0)
        flock(lock, LOCK_EX);
    if (!real || !mount_is_dead(real))
        return real; /* another has */
    if (!mount_is_ours(real) || fs_run(unmount) < 0)
        return false;
    fprintf(stderr, "vmsfs: %s was still the mount of a daemon that has died: cleared away\n",
            path);
    return true;
}

static bool check_mountpoint(const char *path, const char *state_dir) {
    struct stat st;
    if (mount_is_dead(path) && !clear_dead_mount(path, state_dir)) {
        fprintf(stderr,
                "vmsfs: %s is the mount of a daemon that has died: clear it away with "
                "fusermount3 -uz %s\n",
                path, path);
        return false;
    }
    if (stat(path, &st) == 0) {
        if (S_ISDIR(st.st_mode))
            return true;
        errno = ENOTDIR;
    }
    if (errno == ENOENT)
        fprintf(stderr, "vmsfs: there is no %s: make it with mkdir\n", path);
    else
        fprintf(stderr, "vmsfs: %s is not a directory that can be used: %s\n", path,
                strerror(errno));
    return false;
}

static bool check_device(void) {
    cleanup_free char *found = NULL, *remedy = NULL;
    if (fuse_device_check(&found, &remedy))
        return true;
    fprintf(stderr, "vmsfs: %s: %s\n", found ? found : "/dev/fuse", remedy ? remedy : "");
    return false;
}

bool options_check(const struct options *options, char **ret_backend) {
    const struct vm_config *config = &options->settings.config;
    const struct vmm_ops *backend;
    struct image image;
    cleanup_free char *why = NULL;
    /* What mount(8) has opened and mounted already is neither looked for nor opened. */
    if (strncmp(options->settings.mountpoint, "/dev/fd/", 8) != 0 &&
        (!check_mountpoint(options->settings.mountpoint, options->settings.state_dir) ||
         !check_device()))
        return false;
    /* A backend that cannot work is said before an image that is not there. */
    if (vmm_find(config->backend, NULL, &backend, &why) < 0)
        return option_say_why("-o backend", why);
    if (backend->existing) {
        *ret_backend = strdup(why);
        return *ret_backend;
    }
    free(why);
    why = NULL;
    if (image_open(&options->settings, config->image, &image, &why) < 0) {
        fprintf(stderr, "vmsfs: %s\n", why ? why : "out of memory");
        return false;
    }
    const char *option = NULL;
    if (image_check_memory(&image, config->image, config->memory, &why) < 0)
        option = "-o memory";
    else if (image_check_disk(&image, config->image, config->disk, &why) < 0)
        option = "-o disk";
    else if (boot_find_backend(&options->settings, config, &image, &backend, &why) < 0)
        option = "-o backend";
    else
        *ret_backend = strndup(why, vmm_brief_length(why));
    image_close(&image);
    return option ? option_say_why(option, why) : *ret_backend != NULL;
}
