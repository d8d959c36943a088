#include "vm/config.h"

#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "guest/guest.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/number.h"
#include "vmm/backends.h"

#define CONFIG_LINE_MOST 1024 /* of the 2048 bytes that Linux takes on x86 */
#define CONFIG_QUOTED_MOST 60 /* of a wrong value, in a sentence about it */

#define CONFIG_BACKEND(name, automatic) #name,
static const char *const config_backends[] = {"auto", VMM_BACKENDS(CONFIG_BACKEND) NULL};
#undef CONFIG_BACKEND
static const char *const config_yes_no[] = {"yes", "no", NULL};
static const char *const config_warms[] = {"auto", "off", NULL};
static const char *const config_shells[] = {"login", "raw", NULL};

#define CONFIG_FIELD(field) .name = #field, .offset = offsetof(struct vm_config, field)
const struct config_setting config_settings[CONFIG_SETTINGS] = {
    {CONFIG_FIELD(address), .kind = CONFIG_HOST_NAME, .standard = "", .otherwise = "none",
     .help = "the machine to attach", .flags = CONFIG_PLACE | CONFIG_MACHINE},
    {CONFIG_FIELD(backend), .kind = CONFIG_CHOICE, .choices = config_backends, .standard = "auto",
     .help = "what runs the VM", .flags = CONFIG_PLACE | CONFIG_MACHINE},
    {CONFIG_FIELD(boot_args), .kind = CONFIG_TEXT, .most = CONFIG_LINE_MOST, .standard = "",
     .otherwise = "nothing", .help = "arguments of the kernel, behind the image's"},
    {CONFIG_FIELD(boot_timeout), .kind = CONFIG_SECONDS, .least = 1, .most = 86400,
     .standard = "60", .help = "longest time from mkdir to running"},
    {CONFIG_FIELD(cpu_model), .kind = CONFIG_CPU_MODEL, .most = 255, .standard = "",
     .otherwise = "the backend's choice", .help = "CPU that the guest sees, such as max"},
    {CONFIG_FIELD(disk), .kind = CONFIG_SIZE, .least = 16, .most = 8 << 20, .standard = "0",
     .help = "persistent disk in MiB, 0: none", .flags = CONFIG_OR_ZERO},
    {CONFIG_FIELD(env_file), .kind = CONFIG_PATH, .standard = GUEST_ENV_FILE,
     .help = "the variables' file in the guest", .flags = CONFIG_PLACE},
    {CONFIG_FIELD(host_key), .kind = CONFIG_HOST_PATH, .standard = "",
     .otherwise = "what is seen first", .help = "file with the host key of a machine to attach"},
    {CONFIG_FIELD(idle_timeout), .kind = CONFIG_SECONDS, .least = 0, .most = 31536000,
     .standard = "0", .help = "stops a VM that nobody uses for so long; 0: never",
     .flags = CONFIG_LIVE},
    {CONFIG_FIELD(image), .kind = CONFIG_IMAGE, .least = 1, .most = PATH_MAX - 1,
     .standard = "tiny", .help = "a folder's name, or its path"},
    {CONFIG_FIELD(jail_user), .kind = CONFIG_USER_NAME, .standard = "", .otherwise = "no jail",
     .help = "host's user to run Firecracker as, by its jailer"},
    {CONFIG_FIELD(key), .kind = CONFIG_HOST_PATH, .standard = "", .otherwise = "the daemon's own",
     .help = "private key for a machine to attach"},
    {CONFIG_FIELD(lifetime), .kind = CONFIG_SECONDS, .least = 0, .most = 31536000, .standard = "0",
     .help = "stops a VM after it has run so long; 0: never", .flags = CONFIG_LIVE},
    {CONFIG_FIELD(memory), .kind = CONFIG_SIZE, .least = 16, .most = 1 << 20, .standard = "",
     .otherwise = "what the image says", .help = "memory in MiB"},
    {CONFIG_FIELD(port), .kind = CONFIG_NUMBER, .least = 1, .most = 65535, .standard = "22",
     .help = "SSH port of a machine to attach", .flags = CONFIG_PLACE | CONFIG_MACHINE},
    {CONFIG_FIELD(protected), .kind = CONFIG_CHOICE, .choices = config_yes_no, .standard = "no",
     .help = "yes: rmdir and rm -r are refused", .flags = CONFIG_LIVE},
    {CONFIG_FIELD(shell), .kind = CONFIG_CHOICE, .choices = config_shells, .standard = "login",
     .help = "what commands are run by", .flags = CONFIG_LIVE},
    {CONFIG_FIELD(stop_timeout), .kind = CONFIG_SECONDS, .least = 0, .most = 86400,
     .standard = "10", .help = "time for the guest to power down by itself", .flags = CONFIG_LIVE},
    {CONFIG_FIELD(tap), .kind = CONFIG_INTERFACE, .standard = "", .otherwise = "none",
     .help = "tap interface of the host for the guest's network"},
    {CONFIG_FIELD(user), .kind = CONFIG_USER_NAME, .standard = "",
     .otherwise = "what the image says, else root", .help = "whom to log in as"},
    {CONFIG_FIELD(vcpus), .kind = CONFIG_NUMBER, .least = 1, .most = 64, .standard = "",
     .otherwise = "what the image says", .help = "CPUs"},
    {CONFIG_FIELD(warm), .kind = CONFIG_CHOICE, .choices = config_warms, .standard = "auto",
     .help = "off: boots cold, from no template"},
};

/* ---- what each kind takes ---- */

static bool text_holds_only(const char *text, const char *letters) {
    static const char both[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    for (const char *c = text; *c; c++)
        if (!strchr(both, *c) && !strchr(letters, *c))
            return false;
    return true;
}

/* Without control characters, and such that JSON can hold it (UTF-8). */
static bool text_is_one_line(const char *text) {
    for (const char *c = text; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            return false;
    json_t *json = json_string(text);
    bool valid = json;
    json_decref(json);
    return valid;
}

static bool line_is_valid(const struct config_setting *s, const char *text, unsigned *ret_number) {
    (void)ret_number;
    size_t length = strlen(text);
    return length >= s->least && length <= s->most && text_is_one_line(text);
}

static void line_explain(const struct config_setting *s, struct buf *out) {
    buf_printf(out, "one line of at most %u bytes", s->most);
}

static bool number_is_valid(const struct config_setting *s, const char *text,
                            unsigned *ret_number) {
    unsigned long long number = 0;
    if (!*text)
        return false;
    for (const char *c = text; *c; c++) {
        if (*c < '0' || *c > '9')
            return false;
        number = number * 10 + (unsigned)(*c - '0');
        if (number > s->most)
            return false;
    }
    *ret_number = (unsigned)number;
    return number >= s->least;
}

static void number_explain(const struct config_setting *s, struct buf *out) {
    buf_printf(out, "a number from %u to %u", s->least, s->most);
}

static void seconds_explain(const struct config_setting *s, struct buf *out) {
    buf_printf(out, "a number of seconds from %u to %u", s->least, s->most);
}

static bool size_is_valid(const struct config_setting *s, const char *text, unsigned *ret_number) {
    const uint64_t unit = 1 << 20;
    uint64_t bytes;
    if (number_parse_size(text, unit, &bytes) < 0 || bytes % unit || bytes / unit > s->most ||
        (bytes / unit < s->least && (bytes || !(s->flags & CONFIG_OR_ZERO))))
        return false;
    *ret_number = (unsigned)(bytes / unit);
    return true;
}

static void size_explain(const struct config_setting *s, struct buf *out) {
    buf_printf(out, "%sa number of MiB from %u to %u, or one with M or G behind it",
               s->flags & CONFIG_OR_ZERO ? "0, for none, or " : "", s->least, s->most);
}

static bool choice_is_valid(const struct config_setting *s, const char *text,
                            unsigned *ret_number) {
    (void)ret_number;
    for (const char *const *choice = s->choices; *choice; choice++)
        if (strcmp(*choice, text) == 0)
            return true;
    return false;
}

static void choice_explain(const struct config_setting *s, struct buf *out) {
    buf_append_str(out, "one of: ");
    for (const char *const *choice = s->choices; *choice; choice++)
        buf_printf(out, "%s%s", choice == s->choices ? "" : ", ", *choice);
}

/* Absolute, without `.`, `..` and empty parts. */
static bool path_is_valid(const struct config_setting *s, const char *text, unsigned *ret_number) {
    (void)s, (void)ret_number;
    for (const char *part = text; *part == '/'; part += strcspn(part, "/")) {
        size_t length = strcspn(++part, "/");
        if (length == 0 || length > NAME_MAX ||
            (part[0] == '.' && (length == 1 || (length == 2 && part[1] == '.'))))
            return false;
    }
    return text[0] == '/' && strlen(text) < PATH_MAX && text_is_one_line(text);
}

static void path_explain(const struct config_setting *s, struct buf *out) {
    (void)s;
    buf_append_str(out, "the absolute path of a file in the guest");
}

/* It goes into ssh_config, between quotes. */
static bool host_path_is_valid(const struct config_setting *s, const char *text,
                               unsigned *ret_number) {
    return path_is_valid(s, text, ret_number) && !strchr(text, '"');
}

static void host_path_explain(const struct config_setting *s, struct buf *out) {
    (void)s;
    buf_append_str(out, "the absolute path of a file on the host");
}

static bool image_is_valid(const struct config_setting *s, const char *text, unsigned *ret_number) {
    return line_is_valid(s, text, ret_number) &&
           (text[0] == '/' || (text[0] != '.' && !strchr(text, '/')));
}

static void image_explain(const struct config_setting *s, struct buf *out) {
    (void)s;
    buf_append_str(out, "one line, the name of an image's folder or its absolute path");
}

/* `:` and `%` are for IPv6. */
static bool host_is_valid(const struct config_setting *s, const char *text, unsigned *ret_number) {
    (void)s, (void)ret_number;
    return strlen(text) <= 253 && text[0] != '-' && text_holds_only(text, "_.-:%");
}

static void host_explain(const struct config_setting *s, struct buf *out) {
    (void)s;
    buf_append_str(out, "a host's name or IP address");
}

/* It goes into ssh_config: nothing that could be more than a name. */
static bool user_is_valid(const struct config_setting *s, const char *text, unsigned *ret_number) {
    (void)s, (void)ret_number;
    return strlen(text) <= 32 && text[0] != '-' && text_holds_only(text, "_.-");
}

static void user_explain(const struct config_setting *s, struct buf *out) {
    (void)s;
    buf_append_str(out, "a user's name of letters, digits, _ . and -");
}

/* As Linux names them (IFNAMSIZ). */
static bool interface_is_valid(const struct config_setting *s, const char *text,
                               unsigned *ret_number) {
    (void)s, (void)ret_number;
    return strlen(text) <= 15 && text[0] != '-' && text[0] != '.' && text_holds_only(text, "_.-");
}

static void interface_explain(const struct config_setting *s, struct buf *out) {
    (void)s;
    buf_append_str(out, "the name of a network interface of the host");
}

/* What QEMU takes for a CPU; that it knows it is for QEMU to say. */
static bool cpu_is_valid(const struct config_setting *s, const char *text, unsigned *ret_number) {
    (void)ret_number;
    return strlen(text) <= s->most && !strchr("+,=-", text[0]) && text_holds_only(text, "_.+,=-");
}

static void cpu_explain(const struct config_setting *s, struct buf *out) {
    (void)s;
    buf_append_str(out, "a CPU model of QEMU of letters, digits, _ . and -, with features such as "
                        "+avx2 or vendor=AuthenticAMD behind commas");
}

static const struct {
    const char *placeholder;
    bool counts; /* the field is an unsigned */
    bool (*is_valid)(const struct config_setting *s, const char *text, unsigned *ret_number);
    void (*explain)(const struct config_setting *s, struct buf *out);
} config_kinds[] = {
    [CONFIG_TEXT] = {"TEXT", false, line_is_valid, line_explain},
    [CONFIG_NUMBER] = {"N", true, number_is_valid, number_explain},
    [CONFIG_SIZE] = {"MIB", true, size_is_valid, size_explain},
    [CONFIG_SECONDS] = {"S", true, number_is_valid, seconds_explain},
    [CONFIG_CHOICE] = {"WORD", false, choice_is_valid, choice_explain},
    [CONFIG_PATH] = {"PATH", false, path_is_valid, path_explain},
    [CONFIG_HOST_PATH] = {"FILE", false, host_path_is_valid, host_path_explain},
    [CONFIG_IMAGE] = {"NAME", false, image_is_valid, image_explain},
    [CONFIG_HOST_NAME] = {"HOST", false, host_is_valid, host_explain},
    [CONFIG_USER_NAME] = {"NAME", false, user_is_valid, user_explain},
    [CONFIG_INTERFACE] = {"NAME", false, interface_is_valid, interface_explain},
    [CONFIG_CPU_MODEL] = {"MODEL", false, cpu_is_valid, cpu_explain},
};

const char *config_placeholder(const struct config_setting *setting) {
    return config_kinds[setting->kind].placeholder;
}

/* ---- the fields ---- */

static char **config_text(const struct vm_config *config, const struct config_setting *s) {
    return (char **)(void *)((char *)(uintptr_t)config + s->offset);
}

static unsigned *config_number(const struct vm_config *config, const struct config_setting *s) {
    return (unsigned *)(void *)((char *)(uintptr_t)config + s->offset);
}

const struct config_setting *config_find(const char *name) {
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        if (strcmp(config_settings[i].name, name) == 0)
            return &config_settings[i];
    return NULL;
}

void config_free(struct vm_config *config) {
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        if (!config_kinds[config_settings[i].kind].counts)
            free(*config_text(config, &config_settings[i]));
    *config = (struct vm_config){0};
}

/* Puts in a value that is valid. */
static int config_put(struct vm_config *config, const struct config_setting *s, const char *text,
                      unsigned number) {
    if (config_kinds[s->kind].counts) {
        unsigned *field = config_number(config, s);
        bool changes = *field != number;
        *field = number;
        return changes;
    }
    char **field = config_text(config, s);
    if (*field && strcmp(*field, text) == 0)
        return 0;
    char *copy = strdup(text);
    if (!copy)
        return -ERR_NO_MEMORY;
    free(*field);
    *field = copy;
    return 1;
}

static int config_reset(struct vm_config *config, const struct config_setting *s) {
    unsigned number = 0;
    if (s->standard[0])
        config_kinds[s->kind].is_valid(s, s->standard, &number);
    return config_put(config, s, s->standard, number);
}

int config_init(struct vm_config *ret_config) {
    struct vm_config config = {0};
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        if (config_reset(&config, &config_settings[i]) < 0) {
            config_free(&config);
            return -ERR_NO_MEMORY;
        }
    *ret_config = config;
    return 0;
}

int config_copy(struct vm_config *ret_config, const struct vm_config *from) {
    struct vm_config config = {0};
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        const struct config_setting *s = &config_settings[i];
        bool counts = config_kinds[s->kind].counts;
        if (config_put(&config, s, counts ? NULL : *config_text(from, s),
                       counts ? *config_number(from, s) : 0) < 0) {
            config_free(&config);
            return -ERR_NO_MEMORY;
        }
    }
    *ret_config = config;
    return 0;
}

void config_print(const struct vm_config *config, const struct config_setting *setting,
                  struct buf *out) {
    if (!config_kinds[setting->kind].counts)
        buf_append_str(out, *config_text(config, setting));
    else if (*config_number(config, setting) >= setting->least || (setting->flags & CONFIG_OR_ZERO))
        buf_printf(out, "%u", *config_number(config, setting));
}

/* The beginning of what was written, without what would lead a line astray. */
static void config_quote(const char *text, size_t length, struct buf *out) {
    size_t n = length < CONFIG_QUOTED_MOST ? length : CONFIG_QUOTED_MOST;
    while (n < length && n > 0 && ((unsigned char)text[n] & 0xc0) == 0x80)
        n--;
    buf_append_char(out, '"');
    for (size_t i = 0; i < n; i++)
        buf_append_char(out, (unsigned char)text[i] < 0x20 || text[i] == 0x7f ? '?' : text[i]);
    buf_append_str(out, n < length ? "…\"" : "\"");
}

#define CONFIG_PART_LEAST 3 /* letters of a value that are not in other words by chance */

/* Is the value, or what is in it between blanks and commas, quoted there? */
static bool config_is_quoted(const char *value, const char *words) {
    for (const char *part = value; *part;) {
        part += strspn(part, " ,+-");
        size_t length = strcspn(part, " ,");
        if (length >= CONFIG_PART_LEAST && memmem(words, strlen(words), part, length))
            return true;
        part += length;
    }
    return false;
}

void config_name_quoted(const struct vm_config *config, const char *words, struct buf *out) {
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        const struct config_setting *s = &config_settings[i];
        if (config_kinds[s->kind].counts || s->kind == CONFIG_CHOICE)
            continue;
        const char *value = *config_text(config, s);
        if (strcmp(value, s->standard) != 0 && config_is_quoted(value, words))
            buf_printf(out, "%sconfig/%s", out->len ? ", " : "", s->name);
    }
}

int config_refuse(const struct config_setting *s, const char *text, size_t length, char **ret_why) {
    struct buf why = {0};
    buf_printf(&why, "%s takes ", s->name);
    config_kinds[s->kind].explain(s, &why);
    buf_append_str(&why, ", not ");
    config_quote(text, length, &why);
    buf_printf(&why, "; its default is %s", s->standard[0] ? s->standard : s->otherwise);
    *ret_why = buf_steal(&why, NULL);
    return *ret_why ? -ERR_INVALID : -ERR_NO_MEMORY;
}

static int config_refuse_name(const char *name, char **ret_why) {
    struct buf why = {0};
    buf_append_str(&why, "there is no setting ");
    config_quote(name, strlen(name), &why);
    buf_append_str(&why, "; there are");
    for (size_t i = 0; i < CONFIG_SETTINGS; i++)
        buf_printf(&why, " %s", config_settings[i].name);
    *ret_why = buf_steal(&why, NULL);
    return *ret_why ? -ERR_NOT_FOUND : -ERR_NO_MEMORY;
}

static bool is_blank(char c) {
    return c == ' ' || c == '\t' || c == '\r';
}

int config_set(struct vm_config *config, const char *name, const char *text, size_t length,
               char **ret_why) {
    const struct config_setting *s = config_find(name);
    unsigned number = 0;
    *ret_why = NULL;
    if (!s)
        return config_refuse_name(name, ret_why);
    if (length > 0 && text[length - 1] == '\n')
        length--;
    for (; length > 0 && is_blank(text[0]); text++)
        length--;
    while (length > 0 && is_blank(text[length - 1]))
        length--;
    if (length == 0)
        return config_reset(config, s);
    cleanup_free char *value = strndup(text, length);
    if (!value)
        return -ERR_NO_MEMORY;
    if (memchr(text, 0, length) || !config_kinds[s->kind].is_valid(s, value, &number))
        return config_refuse(s, text, length, ret_why);
    return config_put(config, s, value, number);
}

json_t *config_save(const struct vm_config *config) {
    json_t *saved = json_object();
    for (size_t i = 0; saved && i < CONFIG_SETTINGS; i++) {
        const struct config_setting *s = &config_settings[i];
        json_t *value = config_kinds[s->kind].counts ? json_integer(*config_number(config, s))
                                                     : json_string(*config_text(config, s));
        if (json_object_set_new(saved, s->name, value) < 0) {
            json_decref(saved);
            saved = NULL;
        }
    }
    return saved;
}

/* A number that is not set is recorded as 0. */
static int config_load_one(struct vm_config *config, const struct config_setting *s,
                           const json_t *value, char **ret_why) {
    cleanup_buf struct buf text = {0};
    if (json_is_integer(value) && (json_integer_value(value) != 0 || s->least == 0))
        buf_printf(&text, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    else if (json_is_string(value))
        buf_append(&text, json_string_value(value), json_string_length(value));
    else if (!json_is_integer(value))
        return config_refuse(s, "?", 1, ret_why);
    return config_set(config, s->name, text.data ? text.data : "", text.len, ret_why);
}

int config_load(struct vm_config *config, const json_t *saved, char **ret_why) {
    cleanup_buf struct buf all = {0};
    int status = 0;
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        const struct config_setting *s = &config_settings[i];
        const json_t *value = json_object_get(saved, s->name);
        char *why = NULL;
        int r = config_reset(config, s);
        if (r >= 0 && value)
            r = config_load_one(config, s, value, &why);
        if (r >= 0)
            continue;
        if (why)
            buf_printf(&all, "%s%s", all.len ? "; " : "", why);
        free(why);
        status = r;
    }
    *ret_why = all.len ? buf_steal(&all, NULL) : NULL;
    return status;
}
