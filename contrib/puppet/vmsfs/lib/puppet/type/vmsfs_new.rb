# frozen_string_literal: true

Puppet::Type.newtype(:vmsfs_new) do
  @doc = <<~DOC
    A virtual machine that comes into being with all that it is to have: it is filled in `.new/`, where nothing boots, and the
    rename boots it, so that its first login has its variables. One that is there is left alone. vmsfs::vm uses this.
  DOC

  newparam(:path, namevar: true) do
    desc 'The directory of the VM: the mount point and its id.'
  end

  newparam(:template) do
    desc 'A folder with `env/`, `config/` and `forward`, as far as needed, that it is a copy of.'
  end

  newparam(:config) do
    desc 'Its settings, over those of the template.'
    defaultto({})
  end

  newparam(:env) do
    desc 'Its variables, over those of the template.'
    defaultto({})
  end

  newproperty(:ensure) do
    newvalue(:present) { resource.make }
    defaultto :present

    def retrieve
      File.directory?(resource[:path]) ? :present : :absent
    end
  end

  # Also the message of what goes wrong quotes no value.
  def make
    mount, id = File.split(self[:path])
    raise Puppet::Error, "there is no vmsfs at #{mount}: mount it, or set the parameter mount" unless File.directory?("#{mount}/.new")

    fresh = "#{mount}/.new/#{id}"
    run('rm', '-r', fresh) if File.exist?(fresh) # of an attempt that has failed
    self[:template] ? run('cp', '-r', self[:template], fresh) : Dir.mkdir(fresh)
    begin
      self[:config].each { |name, value| put("#{fresh}/config/#{name}", "#{value}\n") }
      self[:env].each { |key, value| put("#{fresh}/env/#{key}", value.to_s) }
      File.rename(fresh, self[:path])
    rescue SystemCallError => e
      why = File.exist?("#{fresh}/error") ? File.read("#{fresh}/error").strip : ''
      raise Puppet::Error, "#{e.message}; #{why}"
    end
  end

  def run(*command)
    Puppet::Util::Execution.execute(command, failonfail: true, combine: true)
  end

  # One write for all of it, which has the verdict.
  def put(path, bytes)
    File.open(path, File::WRONLY | File::CREAT | File::TRUNC, 0o600) do |file|
      file.binmode
      file.sync = true
      file.write(bytes)
    end
  end

  # A parameter can be sensitive only where its type says so.
  def set_sensitive_parameters(names)
    parameter(:env).sensitive = true if names.delete(:env)
    super(names)
  end
end
