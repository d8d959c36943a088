# @summary A virtual machine: a directory of a vmsfs mount.
#
# A new one is filled in .new/ and boots with its settings; its variables are in it before its first login. What is changed
# later is changed in the VM that runs.
#
# @param ensure how it has to be; absent destroys it, with its disk
# @param id its name: letters, digits and -
# @param mount where vmsfs is mounted
# @param template a folder with env/, config/ and forward, as far as needed, of which a new VM is a copy
# @param config settings, as the files of config/ take them. What is not named stays as it is
# @param restart whether a running VM is stopped and started for a setting that cannot change while it runs
# @param env variables
# @param secrets variables whose values are neither shown nor logged
# @param env_purge whether all other variables are unset
# @param commands commands for the VM's sh, by what they do, in this order, while ensure is running. They run when the path
#   `creates` is not there in the VM, when `unless` fails in it, or each time
# @param timeout for each command and each change of state, in seconds
#
# @example
#   vmsfs::vm { 'web':
#     template => '/srv/templates/web',
#     config   => { 'memory' => '512M' },
#     env      => { 'APP_ENV' => 'production' },
#     secrets  => Sensitive({ 'API_TOKEN' => lookup('web_token') }),
#     commands => { 'make the folder of the application' => { 'command' => 'mkdir /srv/app', 'creates' => '/srv/app' } },
#   }
define vmsfs::vm (
  Enum['running', 'stopped', 'paused', 'absent'] $ensure = 'running',
  Pattern[/\A[A-Za-z0-9][A-Za-z0-9-]{0,62}\z/] $id = $title,
  Pattern[/\A\//] $mount = '/vms',
  Optional[Pattern[/\A\//]] $template = undef,
  Hash[Pattern[/\A[a-z_]+\z/], Variant[String, Integer, Boolean]] $config = {},
  Boolean $restart = false,
  Hash[Pattern[/\A[A-Za-z_][A-Za-z0-9_]*\z/], Variant[String, Integer]] $env = {},
  Sensitive[Hash[Pattern[/\A[A-Za-z_][A-Za-z0-9_]*\z/], Variant[String, Integer]]] $secrets = Sensitive({}),
  Boolean $env_purge = false,
  Hash[String, Struct[{ 'command' => String, Optional['creates'] => String, Optional['unless'] => String }]] $commands = {},
  Integer[0] $timeout = 300,
) {
  $vm = "${mount}/${id}"

  # The scripts are in the environment, since an exec that fails prints all of its command.
  Exec {
    path        => '/usr/bin:/bin',
    timeout     => $timeout,
    environment => ['setting', 'state'].map |$name| {
      "VMSFS_${upcase($name)}=${file("vmsfs/${name}.sh")}"
    },
  }

  if $ensure == 'absent' {
    exec { "vmsfs ${id}: remove":
      command => ['rmdir', $vm],
      onlyif  => [['test', '-d', $vm]],
    }
  } else {
    # As the files read: memory and disk in MiB.
    $settings = $config.reduce({}) |$sum, $setting| {
      [$name, $value] = $setting
      $text = $value ? {
        true    => 'yes',
        false   => 'no',
        default => String($value),
      }
      $sum + {
        $name => [$name, $text] ? {
          [/\A(memory|disk)\z/, /\A\d+[Mm]\z/] => $text[0, -2],
          [/\A(memory|disk)\z/, /\A\d+[Gg]\z/] => String(Integer($text[0, -2], 10) * 1024),
          default                              => $text,
        },
      }
    }

    vmsfs_new { $vm:
      template => $template,
      config   => $settings,
      env      => Sensitive($env + $secrets.unwrap),
    }

    $settings.each |$setting, $value| {
      exec { "vmsfs ${id}: set ${setting} to ${value}":
        command => ['sh', '-c', 'eval "$VMSFS_SETTING"', 'setting', $vm, $setting, $value, String($restart)],
        unless  => [['sh', '-c', '[ "$(cat "$1")" = "$2" ]', 'same', "${vm}/config/${setting}", $value]],
        require => Vmsfs_new[$vm],
        before  => Exec["vmsfs ${id}: be ${ensure}"],
      }
    }

    # Variables can be set in every state but this one.
    if $ensure != 'paused' {
      exec { "vmsfs ${id}: go on":
        command => ['sh', '-c', 'eval "$VMSFS_STATE"', 'state', $vm, $ensure],
        onlyif  => [['grep', '-qx', 'paused', "${vm}/status"]],
        require => Vmsfs_new[$vm],
        before  => File["${vm}/env"],
      }
    }

    ($env + $secrets.unwrap).each |$key, $value| {
      file { "${vm}/env/${key}":
        ensure  => file,
        content => $key in $secrets.unwrap ? {
          true    => Sensitive(String($value)),
          default => String($value),
        },
        mode    => '0600',
        backup  => false,
        before  => Exec["vmsfs ${id}: be ${ensure}"],
      }
    }
    file { "${vm}/env":
      ensure  => directory,
      recurse => $env_purge,
      purge   => $env_purge,
      force   => $env_purge,
      backup  => false,
      require => Vmsfs_new[$vm],
      before  => Exec["vmsfs ${id}: be ${ensure}"],
    }

    exec { "vmsfs ${id}: be ${ensure}":
      command => ['sh', '-c', 'eval "$VMSFS_STATE"', 'state', $vm, $ensure],
      unless  => [['grep', '-qx', $ensure, "${vm}/status"]],
    }

    if $ensure == 'running' {
      # A program that is not there is an error to Puppet, also when it only says what it would do and the VM is to be made yet.
      $run = ['sh', '-c', '[ -x "$1" ] && exec "$@"', 'run', "${vm}/run", '-n']
      $commands.each |$what, $command| {
        if 'unless' in $command {
          $unless = { 'unless' => [[*$run, 'sh', '-c', $command['unless']]] }
        } elsif 'creates' in $command {
          $unless = { 'unless' => [[*$run, 'test', '-e', $command['creates']]] }
        } else {
          $unless = {}
        }
        exec { "vmsfs ${id}: ${what}":
          command => [*$run, 'sh', '-c', $command['command']],
          require => Exec["vmsfs ${id}: be ${ensure}"],
          *       => $unless,
        }
      }
    }
  }
}
