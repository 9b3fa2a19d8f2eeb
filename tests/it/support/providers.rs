//! Servers that greet, offer and refuse as well-known providers do, in the words that advice goes by.
//! Guarantee: the right user name and password work at each; what is refused is refused in the provider's own words.

use super::smtp_server::{Action, Behaviour, Rule, Stage};

/// How one provider's server speaks. TLS and the demanded login are the test's.
#[derive(Debug, Clone, Copy)]
pub struct Provider {
    banner: &'static str,
    mechanisms: &'static [&'static str],
    keywords: &'static [&'static str],
    size: Option<usize>,
    /// Its reply to a wrong user name or password.
    pub wrong_login: &'static str,
}

impl Provider {
    /// Makes a server speak like this one: for `World::with`, `World::with_server` or `SmtpServer::change`.
    pub fn speaks(self) -> impl FnOnce(&mut Behaviour) {
        move |behaviour| {
            behaviour.banner = self.banner;
            behaviour.mechanisms = self.mechanisms.to_vec();
            behaviour.more_keywords = self.keywords.to_vec();
            behaviour.size = self.size;
            behaviour.wrong_login = self.wrong_login;
        }
    }

    /// The same, but every login is refused with this reply, the right one too.
    pub fn refuses_login(self, reply: &'static str) -> impl FnOnce(&mut Behaviour) {
        move |behaviour| {
            self.speaks()(behaviour);
            // Nobody's login: the reply comes where the provider gives it, behind the password.
            behaviour.login = Some((String::new(), String::new()));
            behaviour.wrong_login = reply;
        }
    }

    /// The same, with a reply of its own at one stage, every time.
    pub fn says(self, stage: Stage, reply: &'static str) -> impl FnOnce(&mut Behaviour) {
        move |behaviour| {
            self.speaks()(behaviour);
            behaviour.rule(Rule::new(stage, Action::reply(reply)));
        }
    }
}

/// Gmail and Google Workspace.
pub fn gmail() -> Provider {
    Provider {
        banner: "220 smtp.gmail.com ESMTP 5b1f17b1804b1-4329b0e8ab5sm21sm.1 - gsmtp",
        mechanisms: &["LOGIN", "PLAIN", "XOAUTH2", "PLAIN-CLIENTTOKEN", "OAUTHBEARER"],
        keywords: &["CHUNKING"],
        size: Some(35_882_577),
        wrong_login: "535-5.7.8 Username and Password not accepted. For more information, go to\r\n535 5.7.8  \
                      https://support.google.com/mail/?p=BadCredentials 5b1f17b1804b1-4329b0e8ab5sm21 - gsmtp",
    }
}

/// Gmail, where the account has a second factor.
pub const GMAIL_APP_PASSWORD: &str = "534-5.7.9 Application-specific password required. For more information, go \
                                      to\r\n534 5.7.9  https://support.google.com/mail/?p=InvalidSecondFactor \
                                      5b1f17b1804b1-4329b0e8ab5sm21 - gsmtp";
/// Gmail, where it finds a login suspicious.
pub const GMAIL_WEB_LOGIN: &str = "534-5.7.14 <https://accounts.google.com/signin/continue?sarp=1&scc=1&plt=AKgnsbu> \
                                   Please\r\n534-5.7.14 log in via your web browser and then try again.\r\n534 5.7.14  \
                                   Learn more at https://support.google.com/mail/answer/78754 - gsmtp";

/// Microsoft 365 (`smtp.office365.com`).
pub fn microsoft_365() -> Provider {
    Provider {
        banner: "220 AM0PR04CA0001.outlook.office365.com Microsoft ESMTP MAIL Service ready at Mon, 23 Nov 2026 \
                 08:00:00 +0000 [08DE2A1B2C3D4E5F]",
        mechanisms: &["LOGIN", "XOAUTH2"],
        keywords: &["DSN", "BINARYMIME", "CHUNKING"],
        size: Some(157_286_400),
        wrong_login: "535 5.7.3 Authentication unsuccessful [AM0PR04CA0001.eurprd04.prod.outlook.com \
                      2026-11-23T08:00:00.000Z 08DE2A1B2C3D4E5F]",
    }
}

/// Microsoft 365, where passwords are not taken at all.
pub const MICROSOFT_BASIC_AUTH_OFF: &str = "535 5.7.139 Authentication unsuccessful, basic authentication is disabled. \
                                            [AM0PR04CA0001.eurprd04.prod.outlook.com]";
/// Microsoft 365, where SMTP AUTH is off for the whole tenant.
pub const MICROSOFT_SMTP_OFF_FOR_TENANT: &str = "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is \
                                                 disabled for the Tenant. Visit https://aka.ms/smtp_auth_disabled for \
                                                 more information. [AM0PR04CA0001.eurprd04.prod.outlook.com]";
/// Microsoft 365, where SMTP AUTH is off for the mailbox.
pub const MICROSOFT_SMTP_OFF_FOR_MAILBOX: &str = "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is \
                                                  disabled for the Mailbox. Visit https://aka.ms/smtp_auth_disabled \
                                                  for more information. [AM0PR04CA0001.eurprd04.prod.outlook.com]";
/// Microsoft 365, at the final dot: the account is not the sender.
pub const MICROSOFT_SEND_AS: &str = "554 5.2.252 SendAsDenied; mailer@acme.example not allowed to send as \
                                     hello@acme.example; STOREDRV.Submission.Exception:SendAsDeniedException";

/// Amazon SES (`email-smtp.<region>.amazonaws.com`).
pub fn ses() -> Provider {
    Provider {
        banner: "220 email-smtp.amazonaws.com ESMTP SimpleEmailService-d-A1B2C3D4E 0a1b2c3d4e5f6g7h8i9j",
        mechanisms: &["PLAIN", "LOGIN"],
        keywords: &["Ok"],
        size: None,
        wrong_login: "535 Authentication Credentials Invalid",
    }
}

/// SES, at the final dot: neither the address nor its domain is verified in this region.
pub const SES_UNVERIFIED: &str = "554 Message rejected: Email address is not verified. The following identities failed \
                                  the check in region EU-WEST-1: hello@acme.example";

/// Postfix with Dovecot's SASL.
pub fn postfix() -> Provider {
    Provider {
        banner: "220 mail.acme.example ESMTP Postfix (Debian)",
        mechanisms: &["PLAIN", "LOGIN"],
        keywords: &["VRFY", "ETRN", "DSN", "CHUNKING"],
        size: Some(10_240_000),
        wrong_login: "535 5.7.8 Error: authentication failed: (reason unavailable)",
    }
}

/// Postfix, where Dovecot does not answer.
pub const POSTFIX_AUTH_AWAY: &str =
    "454 4.7.0 Temporary authentication failure: Connection lost to authentication server";
/// Postfix, at MAIL or RCPT: the login does not own the sender's address.
pub const POSTFIX_NOT_OWNED: &str =
    "553 5.7.1 <hello@acme.example>: Sender address rejected: not owned by user mailer@acme.example";

/// An Exchange server of one's own.
pub fn exchange() -> Provider {
    Provider {
        banner: "220 EX01.acme.example Microsoft ESMTP MAIL Service ready at Mon, 23 Nov 2026 08:00:00 +0000",
        mechanisms: &["GSSAPI", "NTLM", "LOGIN"],
        keywords: &["X-ANONYMOUSTLS", "X-EXPS GSSAPI NTLM", "BINARYMIME", "CHUNKING", "XRDST"],
        size: Some(37_748_736),
        wrong_login: "535 5.7.3 Authentication unsuccessful",
    }
}

/// Exchange and Microsoft 365, at MAIL: nobody logged in, or not in a way that counts.
pub const EXCHANGE_NOT_AUTHENTICATED: &str =
    "530 5.7.57 SMTP; Client was not authenticated to send anonymous mail during MAIL FROM";
/// Exchange, at the final dot: the account is not the sender.
pub const EXCHANGE_SEND_AS: &str = "550 5.7.60 SMTP; Client does not have permissions to send as this sender";
