#include <errno.h>
#include <stdlib.h>

#include "check.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "vm/config.h"

static struct vm_config config;

static int set(const char *name, const char *text) {
    cleanup_free char *why = NULL;
    return config_set(&config, name, text, strlen(text), &why);
}

static int reads(const char *name, const char *text) {
    cleanup_buf struct buf out = {0};
    config_print(&config, config_find(name), &out);
    return check_same(out.data, out.len, text, strlen(text));
}

/* A value that is refused with a sentence that has all of these words, and changes nothing. */
static void refuses(const char *name, const char *text, size_t length, const char *const *words) {
    cleanup_free char *why = NULL;
    cleanup_buf struct buf before = {0}, after = {0};
    config_print(&config, config_find(name), &before);
    CHECK_SAID(config_set(&config, name, text, length, &why) == -ERR_INVALID, "%s = %s", name,
               text);
    CHECK_SAID(why && strstr(why, name) == why, "%s = %s: %s", name, text, why);
    for (; *words; words++)
        CHECK_SAID(why && strstr(why, *words), "\"%s\" is not in: %s", *words, why);
    config_print(&config, config_find(name), &after);
    CHECK(check_same(before.data, before.len, after.data, after.len));
}
#define REFUSES(name, text, ...)                                                                   \
    refuses(name, text, strlen(text), (const char *const[]){__VA_ARGS__, NULL})

static void settings_are_sorted_and_found(void) {
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        CHECK(config_find(config_settings[i].name) == &config_settings[i]);
        CHECK_SAID(!i || strcmp(config_settings[i - 1].name, config_settings[i].name) < 0, "%s",
                   config_settings[i].name);
        CHECK(config_settings[i].standard[0] || config_settings[i].otherwise);
    }
    CHECK(!config_find("cpu"));
    CHECK(!config_find(""));
}

/* As it is printed, a value can be written, and changes nothing. */
static void defaults_are_valid(void) {
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        CHECK(reads(config_settings[i].name, config_settings[i].standard));
        CHECK(set(config_settings[i].name, config_settings[i].standard) == 0);
        CHECK(set(config_settings[i].name, "") == 0);
    }
}

static void numbers_have_a_range(void) {
    CHECK(config.vcpus == 0);
    CHECK(set("vcpus", "1") == 1 && config.vcpus == 1);
    CHECK(set("vcpus", "64") == 1 && config.vcpus == 64);
    CHECK(set("vcpus", "064") == 0);
    static const char *const bad[] = {
        "0", "65", "-1", "+1", "3.5", "two", "1 2", "0x2", "2k", "1\n2", "99999999999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("vcpus", bad[i], "a number from 1 to 64", "what the image says");
    CHECK(set("vcpus", "") == 1 && config.vcpus == 0);
    REFUSES("boot_timeout", "0", "seconds", "1 to 86400", "its default is 60");
    CHECK(set("stop_timeout", "0") == 1 && config.stop_timeout == 0 && reads("stop_timeout", "0"));
    CHECK(set("stop_timeout", "\n") == 1 && config.stop_timeout == 10);
}

static void sizes_have_units(void) {
    CHECK(set("memory", "512") == 1 && config.memory == 512);
    CHECK(set("memory", "512M") == 0);
    CHECK(set("memory", "1G") == 1 && config.memory == 1024 && reads("memory", "1024"));
    CHECK(set("memory", "2g") == 1 && config.memory == 2048);
    CHECK(set("memory", "1024G") == 1 && config.memory == 1 << 20);
    static const char *const bad[] = {"15",    "1025G", "1048577", "512K",
                                      "512MB", "1 G",   "M",       "1.5G"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("memory", bad[i], "number of MiB", "16", "1048576", "what the image says");
    CHECK(set("memory", "") == 1);
}

static void a_disk_may_be_none(void) {
    CHECK(config.disk == 0 && reads("disk", "0") && set("disk", "0\n") == 0);
    CHECK(set("disk", "16") == 1 && config.disk == 16);
    CHECK(set("disk", "0G") == 1 && config.disk == 0 && reads("disk", "0"));
    CHECK(set("disk", "8T") == 1 && config.disk == 8 << 20 && reads("disk", "8388608"));
    static const char *const bad[] = {"15", "1M", "8193G", "-1", "00x", "0K1", "all"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("disk", bad[i], "0, for none, or a number of MiB", "16", "8388608",
                "its default is 0");
    REFUSES("memory", "0", "takes a number of MiB");
    CHECK(set("disk", "") == 1 && config.disk == 0);
}

static void a_cpu_model_is_one_word_of_qemu(void) {
    static const char *const good[] = {"max", "qemu64,+rdrand,-avx", "Haswell-v1", "x,vendor=a_b.c",
                                       "486"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECK_SAID(set("cpu_model", good[i]) == 1 && reads("cpu_model", good[i]), "%s", good[i]);
    static const char *const bad[] = {"-smp", "+rdrand", ",x", "=",    "max -smp 9",
                                      "max;", "a/b",     "?",  "größe"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("cpu_model", bad[i], "a CPU model", "the backend's choice");
    char text[256];
    memset(text, 'x', sizeof text);
    CHECK(config_set(&config, "cpu_model", text, 255, &(char *){NULL}) == 1);
    refuses("cpu_model", text, 256, (const char *const[]){"a CPU model", NULL});
    CHECK(set("cpu_model", "") == 1);
}

static void an_interface_has_a_name_that_linux_takes(void) {
    CHECK(set("tap", "vm-tap0.1_2") == 1 && reads("tap", "vm-tap0.1_2"));
    CHECK(set("tap", "fifteen-letters") == 1);
    static const char *const bad[] = {"sixteen-letters-", "a/b", "-a", ".", "a b", "\"", "tün"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("tap", bad[i], "a network interface", "its default is none");
    CHECK(set("tap", "") == 1);
    REFUSES("jail_user", "a b", "a user's name", "its default is no jail");
}

static void blanks_around_a_value_are_dropped(void) {
    CHECK(set("vcpus", "  2 \t\n") == 1 && config.vcpus == 2);
    CHECK(set("vcpus", "2\r\n") == 0);
    CHECK(set("vcpus", " \n") == 1 && config.vcpus == 0);
    REFUSES("vcpus", "2\n\n", "a number");
    CHECK(set("boot_args", " debug  loglevel=7 \n") == 1);
    CHECK(strcmp(config.boot_args, "debug  loglevel=7") == 0);
    CHECK(set("boot_args", "") == 1);
}

static void words_are_chosen_from_a_list(void) {
    CHECK(set("shell", "raw") == 1 && set("shell", "raw\n") == 0 && reads("shell", "raw"));
    REFUSES("shell", "Raw", "login, raw", "its default is login");
    CHECK(set("shell", "") == 1 && reads("shell", "login"));
    CHECK(set("backend", "qemu") == 1);
    REFUSES("backend", "bochs", "auto, firecracker, cloud_hypervisor, qemu, attach",
            "not \"bochs\"", "its default is auto");
    CHECK(set("backend", "") == 1);
}

static void paths_are_absolute(void) {
    CHECK(set("env_file", "/srv/my app/env.sh") == 1 && set("env_file", "/x") == 1);
    static const char *const bad[] = {"x", "./x", "/", "/a/", "//a", "/a/../b", "/a/./b", "/a\x01"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("env_file", bad[i], "absolute path");
    CHECK(set("env_file", "") == 1 && reads("env_file", "/etc/profile.d/vmsfs_env.sh"));
}

static void names_cannot_be_more_than_names(void) {
    CHECK(set("user", "www-data") == 1 && set("user", "") == 1);
    static const char *const bad[] = {"-x",   "a b",   "a\nProxyCommand x",
                                      "a\"b", "größe", "a2345678901234567890123456789012x"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("user", bad[i], "a user's name");
}

static void a_machine_is_named_by_host_port_and_files(void) {
    static const char *const hosts[] = {"192.0.2.7", "web.example", "fe80::1%eth0", "a_b-c"};
    for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++)
        CHECK_SAID(set("address", hosts[i]) == 1, "%s", hosts[i]);
    static const char *const bad[] = {"-oProxyCommand=x", "a b", "[::1]", "a/b", "a\"",
                                      "user@host"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        REFUSES("address", bad[i], "a host's name or IP address");
    CHECK(config.port == 22 && set("port", "65535") == 1);
    REFUSES("port", "65536", "1 to 65535", "its default is 22");
    CHECK(set("key", "/root/.ssh/id_ed25519") == 1 && set("host_key", "/etc/a key.pub") == 1);
    REFUSES("key", "/a\"b", "on the host", "the daemon's own");
    REFUSES("host_key", "~/key", "absolute path");
    CHECK(set("address", "") == 1 && set("port", "") == 1 && set("key", "") == 1 &&
          set("host_key", "") == 1);
}

static void a_text_is_one_line_of_utf8(void) {
    CHECK(set("image", "größe") == 1);
    REFUSES("image", "a\nb", "one line");
    REFUSES("image", "\xff\xfe", "one line");
    refuses("image", "a\0b", 3, (const char *const[]){"one line", NULL});
    refuses("vcpus", "1\0", 2, (const char *const[]){"a number", NULL});
    char text[1026];
    memset(text, 'x', sizeof text);
    refuses("boot_args", text, 1025, (const char *const[]){"1024 bytes", "…", NULL});
    CHECK(set("image", "") == 1);
}

static void a_name_that_is_none_is_told_with_those_that_are(void) {
    cleanup_free char *why = NULL;
    CHECK(config_set(&config, "cpu", "1", 1, &why) == -ERR_NOT_FOUND);
    CHECK(why && strstr(why, "\"cpu\"") && strstr(why, " vcpus") && strstr(why, " backend"));
}

static void a_wrong_value_is_quoted_without_control_characters(void) {
    cleanup_free char *why = NULL;
    CHECK(config_set(&config, "vcpus", "a\x1b[31mb", 7, &why) == -ERR_INVALID);
    CHECK(why && strstr(why, "\"a?[31mb\""));
    /* Not in the middle of a character. */
    cleanup_free char *cut = NULL;
    char text[80];
    memset(text, 'x', sizeof text);
    memcpy(text + 59, "ö", 2);
    CHECK(config_set(&config, "vcpus", text, sizeof text, &cut) == -ERR_INVALID);
    CHECK(cut && strstr(cut, "xxx…\""));
}

static int same_as(const struct vm_config *other) {
    for (size_t i = 0; i < CONFIG_SETTINGS; i++) {
        cleanup_buf struct buf a = {0}, b = {0};
        config_print(&config, &config_settings[i], &a);
        config_print(other, &config_settings[i], &b);
        if (!check_same(a.data, a.len, b.data, b.len))
            return 0;
    }
    return 1;
}

static void a_copy_is_the_same_and_its_own(void) {
    struct vm_config copy;
    cleanup_free char *why = NULL;
    CHECK(set("vcpus", "2") == 1 && set("user", "me") == 1);
    CHECK(config_copy(&copy, &config) == 0 && same_as(&copy));
    CHECK(config_set(&copy, "user", "you", 3, &why) == 1 && reads("user", "me") && !same_as(&copy));
    config_free(&copy);
}

static void what_is_saved_is_loaded(void) {
    struct vm_config loaded;
    cleanup_free char *why = NULL;
    CHECK(set("memory", "1G") == 1 && set("stop_timeout", "0") == 1 &&
          set("boot_args", "a \"quoted\" ö") == 1);
    json_t *saved = config_save(&config);
    CHECK(json_integer_value(json_object_get(saved, "memory")) == 1024);
    CHECK(config_init(&loaded) == 0 && !same_as(&loaded));
    CHECK(config_load(&loaded, saved, &why) == 0 && !why && same_as(&loaded));

    /* What is missing is at its default, what is wrong too, and is told. */
    json_object_del(saved, "user");
    json_object_set_new(saved, "vcpus", json_integer(-1));
    json_object_set_new(saved, "image", json_true());
    json_object_set_new(saved, "later", json_string("unknown"));
    CHECK(config_load(&loaded, saved, &why) == -ERR_INVALID && why);
    CHECK(loaded.vcpus == 0 && loaded.memory == 1024 && !loaded.user[0]);
    CHECK(strcmp(loaded.image, "tiny") == 0);
    config_free(&loaded);
    json_decref(saved);
}

static int names(const char *words, const char *expected) {
    cleanup_buf struct buf out = {0};
    config_name_quoted(&config, words, &out);
    return check_same(out.data, out.len, expected, strlen(expected));
}

static void settings_that_are_quoted_are_named(void) {
    CHECK(set("cpu_model", "max,+avx9,-ab") >= 0 && set("tap", "tap7") >= 0);
    CHECK(set("boot_args", "one two=three") >= 0 && set("warm", "off") >= 0);
    CHECK(names("Property '.avx9' not found", "config/cpu_model"));
    CHECK(names("CPU model 'max' or tap7", "config/cpu_model, config/tap"));
    CHECK(names("no such argument: two=three", "config/boot_args"));
    /* Neither what is too short, nor a choice, nor a default. */
    CHECK(names("ab off tiny", "") && names("", ""));
    CHECK(set("cpu_model", "") >= 0 && set("tap", "") >= 0 && set("boot_args", "") >= 0);
}

int main(void) {
    CHECK(config_init(&config) == 0);
    settings_are_sorted_and_found();
    defaults_are_valid();
    numbers_have_a_range();
    sizes_have_units();
    a_disk_may_be_none();
    a_cpu_model_is_one_word_of_qemu();
    an_interface_has_a_name_that_linux_takes();
    blanks_around_a_value_are_dropped();
    words_are_chosen_from_a_list();
    paths_are_absolute();
    names_cannot_be_more_than_names();
    a_machine_is_named_by_host_port_and_files();
    a_text_is_one_line_of_utf8();
    a_name_that_is_none_is_told_with_those_that_are();
    a_wrong_value_is_quoted_without_control_characters();
    a_copy_is_the_same_and_its_own();
    settings_that_are_quoted_are_named();
    what_is_saved_is_loaded();
    config_free(&config);
    return check_end();
}
